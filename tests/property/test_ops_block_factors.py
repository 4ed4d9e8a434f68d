from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffsplit.errors import RecipeError
from ffsplit.ffn.projections import BlockDense, Monarch
from ffsplit.ops.block_factors import block_dense_factors, block_size, monarch_factors, whole_blocks
from ffsplit.ops.linalg import ridged
from ffsplit.ops.lowrank import svd_factors, whitened_factors
from tests.property.amount import examples

properties = examples(40)
SIZES = {"out": st.integers(1, 12), "inner": st.integers(1, 14), "seed": st.integers(0, 2**20)}
RANK, BLOCKS = st.integers(0, 5), st.integers(1, 6)


def problem(out: int, inner: int, seed: int, tokens: int = 50) -> tuple[Tensor, Tensor]:
    """A weight and the Gram of inputs that are correlated across blocks."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = random(tokens, inner) @ random(inner, inner)
    return random(out, inner), ridged(x.T @ x, 1e-3)


def error(weight: Tensor, near: Tensor, gram: Tensor | None = None) -> float:
    difference = weight - near
    return float((difference.square() if gram is None else difference @ gram * difference).sum())


def block_dense(weight: Tensor, *args: object) -> Tensor:
    return BlockDense(weight.shape[1], *block_dense_factors(weight, *args)).dense().detach()  # type: ignore[arg-type]


def monarch(weight: Tensor, *args: object) -> Tensor:
    shape = (weight.shape[0], weight.shape[1])
    return Monarch(shape, *monarch_factors(weight, *args)).dense().detach()  # type: ignore[arg-type]


def cells(weight: Tensor, blocks: int, *, rows: bool) -> list[Tensor]:
    """The pieces that have a rank of their own, from the definition: columns in blocks, rows in strides."""
    width = block_size(weight.shape[1], blocks)
    strips = [weight[j::blocks] for j in range(blocks)] if rows else [weight]
    return [strip[:, start : start + width] for strip in strips for start in range(0, weight.shape[1], width)]


@given(size=st.integers(1, 60), blocks=st.integers(1, 70))
def test_whole_blocks_are_the_most_that_are_not_empty(size: int, blocks: int) -> None:
    def empty(count: int) -> bool:
        return (count - 1) * block_size(size, count) >= size

    found = whole_blocks(size, blocks)
    assert 1 <= found <= blocks
    assert not empty(found)
    width = block_size(size, min(blocks, size))
    assert block_size(size, found) == width


@properties
@given(blocks=BLOCKS, rank=RANK, **SIZES)
def test_without_data_every_piece_is_cut_at_its_best(blocks: int, rank: int, out: int, inner: int, seed: int) -> None:
    """The error is the energy beyond the rank of every piece: less is impossible (Eckart and Young)."""
    weight, _ = problem(out, inner, seed)
    blocks = whole_blocks(inner, min(blocks, out))
    for make, rows in ((block_dense, False), (monarch, True)):
        lost = sum(float(torch.linalg.svdvals(p)[rank:].square().sum()) for p in cells(weight, blocks, rows=rows))
        assert error(weight, make(weight, blocks, rank)) == pytest.approx(lost, rel=1e-6, abs=1e-9)


@properties
@given(blocks=BLOCKS, rank=RANK, swept=st.booleans(), **SIZES)
def test_a_matrix_of_the_structure_is_recovered(
    blocks: int, rank: int, swept: bool, out: int, inner: int, seed: int
) -> None:
    _, gram = problem(out, inner, seed)
    blocks = whole_blocks(inner, min(blocks, out))
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    options = (blocks, rank, gram, 3) if swept else (blocks, rank)
    width, height = block_size(inner, blocks), block_size(out, blocks)
    dense = BlockDense(inner, random(out, blocks * rank), random(blocks, rank, width)).dense().detach()
    torch.testing.assert_close(block_dense(dense, *options), dense, rtol=1e-6, atol=1e-6)
    grid = Monarch((out, inner), random(blocks, blocks * rank, width), random(blocks, height, blocks * rank))
    torch.testing.assert_close(monarch(grid.dense().detach(), *options), grid.dense().detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", [2, 3, 4])
def test_the_published_monarch_is_recovered(side: int) -> None:
    """``P L P^T R`` of Monarch with explicit permutations, n = side^2, is found exactly with cells of rank 1."""
    generator = torch.Generator().manual_seed(side)
    left, right = torch.randn(2, side, side, side, generator=generator, dtype=torch.float64)
    permutation = torch.eye(side**2, dtype=torch.float64)[torch.arange(side**2).reshape(side, side).T.flatten()]
    weight = permutation @ torch.block_diag(*left) @ permutation.T @ torch.block_diag(*right)
    torch.testing.assert_close(monarch(weight, side, 1), weight)
    assert error(weight, block_dense(weight, side, 1)) > 1e-3 * float(weight.square().sum())


@properties
@given(blocks=BLOCKS, rank=st.integers(1, 4), **SIZES)
def test_sweeps_never_raise_the_error_of_the_outputs(blocks: int, rank: int, out: int, inner: int, seed: int) -> None:
    weight, gram = problem(out, inner, seed)
    blocks = whole_blocks(inner, min(blocks, out))
    slack = 1e-7 * error(weight, torch.zeros_like(weight), gram)
    for make in (block_dense, monarch):
        errors = [error(weight, make(weight, blocks, rank, gram, sweeps), gram) for sweeps in range(5)]
        assert all(later <= earlier + slack for earlier, later in pairwise(errors))


@properties
@given(rank=st.integers(1, 4), **SIZES)
def test_inputs_that_are_uncorrelated_across_blocks_need_one_sweep(rank: int, out: int, inner: int, seed: int) -> None:
    """The blocks are then independent problems with a known optimum: the whitened SVD of each."""
    blocks = whole_blocks(inner, 3)
    weight, gram = problem(out, inner, seed)
    pieces = gram.split(block_size(inner, blocks))
    width = block_size(inner, blocks)
    own = [slice(i * width, i * width + len(piece)) for i, piece in enumerate(pieces)]
    gram = torch.block_diag(*(gram[part, part] for part in own))
    best = 0.0
    for part in own:
        a, b = whitened_factors(weight[:, part], gram[part, part], min(rank, out, part.stop - part.start))
        best += error(weight[:, part], a @ b, gram[part, part])
    found = error(weight, block_dense(weight, blocks, rank, gram, 1), gram)
    assert found == pytest.approx(best, rel=1e-6, abs=1e-7 * error(weight, torch.zeros_like(weight), gram))


@properties
@given(rank=st.integers(0, 5), **SIZES)
def test_one_block_is_plain_low_rank(rank: int, out: int, inner: int, seed: int) -> None:
    weight, gram = problem(out, inner, seed)
    rank = min(rank, out, inner)
    scale = error(weight, torch.zeros_like(weight), gram)
    a, b = svd_factors(weight, rank)
    torch.testing.assert_close(block_dense(weight, 1, rank), a @ b, rtol=1e-6, atol=1e-6)
    a, b = whitened_factors(weight, gram, rank)
    for make in (block_dense, monarch):
        found = error(weight, make(weight, 1, rank, gram, 2), gram)
        assert found == pytest.approx(error(weight, a @ b, gram), rel=1e-6, abs=1e-7 * scale)


@pytest.mark.parametrize("make", [block_dense, monarch])
def test_sweeps_end_where_no_small_change_helps(make: object) -> None:
    """At the end the gradient with respect to either factor is zero, by autograd."""
    weight, gram = problem(9, 12, 3)
    factors = (block_dense_factors if make is block_dense else monarch_factors)(weight, 3, 2, gram, 3000)
    left, right = (factor.clone().requires_grad_() for factor in factors)
    module = BlockDense(12, left, right) if make is block_dense else Monarch((9, 12), left, right)
    near = module.dense()
    loss = ((weight - near) @ gram * (weight - near)).sum()
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    start = (block_dense_factors if make is block_dense else monarch_factors)(weight, 3, 2)
    other = BlockDense(12, *start) if make is block_dense else Monarch((9, 12), *start)
    near = other.dense()
    unfitted = torch.autograd.grad(((weight - near) @ gram * (weight - near)).sum(), list(other.parameters()))
    for found, before in zip(gradients, unfitted, strict=True):
        assert float(found.norm()) < 0.02 * float(before.norm())


def test_correlated_inputs_gain_much_from_the_fit() -> None:
    weight, gram = problem(24, 32, 0, tokens=400)
    for make in (block_dense, monarch):
        plain, fitted = (error(weight, make(weight, 4, 3, gram, sweeps), gram) for sweeps in (0, 4))
        assert fitted < 0.7 * plain


@pytest.mark.parametrize("make", [block_dense, monarch])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_degenerate_grams(make: object, dtype: torch.dtype) -> None:
    assert callable(make)
    weight = torch.randn(7, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    token = torch.randn(1, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dead = problem(7, 10, 0)[1]
    dead[4:], dead[:, 4:] = 0, 0  # the whole second block and more
    for gram in (torch.zeros(10, 10), token.T @ token, dead):
        for matrix in (weight, torch.zeros_like(weight)):
            near = make(matrix.double(), 2, 1, gram, 3)
            assert bool(torch.isfinite(near).all())
            assert (
                error(matrix.double(), near, gram.double())
                <= error(matrix.double(), make(matrix.double(), 2, 1), gram.double()) + 1e-5
            )
    same = make(weight.double(), 2, 2, torch.zeros(10, 10), 3)
    torch.testing.assert_close(same, make(weight.double(), 2, 2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("factors", [block_dense_factors, monarch_factors])
def test_impossible_blocks_are_refused(factors: object) -> None:
    assert callable(factors)
    weight = torch.ones(12, 10)
    for blocks in (0, 7, 11):
        with pytest.raises(RecipeError, match=f"blocks={blocks}"):
            factors(weight, blocks, 1)
    with pytest.raises(RecipeError, match="rank=-1"):
        factors(weight, 2, -1)
    with pytest.raises(RecipeError, match="blocks=4"):
        monarch_factors(torch.ones(3, 12), 4, 1)
