from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffsplit.errors import RecipeError
from ffsplit.ops.lowrank import scaled_factors, svd_factors, whitened_factors
from tests.property.amount import examples

properties = examples(50)
shapes = {"out": st.integers(1, 9), "inner": st.integers(1, 9), "seed": st.integers(0, 2**20)}
dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def problem(out: int, inner: int, seed: int, tokens: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inner, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inner, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inner, inner, generator=generator, dtype=torch.float64)
    return weight, x.T @ x


def gram_norm(error: Tensor, gram: Tensor) -> float:
    return float((error @ gram * error).sum().clamp_min(0).sqrt())


@properties
@given(**shapes)
def test_full_rank_is_exact(out: int, inner: int, seed: int) -> None:
    weight, gram = problem(out, inner, seed)
    for a, b in (svd_factors(weight, min(out, inner)), whitened_factors(weight, gram, min(out, inner))):
        assert torch.allclose(a @ b, weight, atol=1e-9)


@properties
@given(**shapes)
def test_matches_the_svd_and_error_falls_with_rank(out: int, inner: int, seed: int) -> None:
    weight, gram = problem(out, inner, seed)
    values = torch.linalg.svdvals(weight)
    root = torch.linalg.cholesky(gram + 1e-9 * gram.diagonal().mean() * torch.eye(inner, dtype=torch.float64))
    whitened_values = torch.linalg.svdvals(weight @ root)
    for rank in range(min(out, inner) + 1):
        a, b = svd_factors(weight, rank)
        assert float((weight - a @ b).norm()) == pytest.approx(float(values[rank:].norm()), abs=1e-7)
        a, b = whitened_factors(weight, gram, rank)
        best = float(whitened_values[rank:].norm())
        assert gram_norm(weight - a @ b, gram) == pytest.approx(best, rel=1e-6, abs=1e-6 * float(whitened_values[0]))


@properties
@given(rank=st.integers(0, 9), dead=st.booleans(), **shapes)
def test_whitening_wins_in_the_gram_norm(rank: int, dead: bool, out: int, inner: int, seed: int) -> None:
    weight, gram = problem(out, inner, seed)
    if dead:
        gram[0], gram[:, 0] = 0.0, 0.0
    rank = min(rank, out, inner)
    plain, white = svd_factors(weight, rank), whitened_factors(weight, gram, rank)
    slack = 1e-4 * gram_norm(weight, gram)
    assert gram_norm(weight - white[0] @ white[1], gram) <= gram_norm(weight - plain[0] @ plain[1], gram) + slack


@properties
@given(rank=st.integers(0, 9), **shapes)
def test_scaling_is_undone_after_the_svd(rank: int, out: int, inner: int, seed: int) -> None:
    """The definition: truncated SVD of ``W S``, times ``S^-1``; and no other matrix of that rank is nearer in ``S``."""
    weight, _ = problem(out, inner, seed)
    scale = torch.rand(inner, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    rank = min(rank, out, inner)
    u, values, v = torch.linalg.svd(weight * scale, full_matrices=False)
    a, b = scaled_factors(weight, scale, rank)
    assert torch.allclose(a @ b, (u[:, :rank] * values[:rank]) @ v[:rank] / scale, atol=1e-6)
    assert torch.allclose(a.T @ a, b @ b.T, atol=1e-8)
    assert float(((weight - a @ b) * scale).norm()) == pytest.approx(float(values[rank:].norm()), abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
def test_scales_of_zero(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    none, plain = scaled_factors(weight, torch.zeros(shape[1]), 2), svd_factors(weight, 2)
    assert torch.allclose(none[0] @ none[1], plain[0] @ plain[1])
    only = torch.zeros(shape[1], dtype=torch.float64)
    only[1] = 5.0
    a, b = scaled_factors(weight, only, 1)
    assert torch.allclose((a @ b)[:, 1], weight[:, 1], atol=1e-6)
    assert bool(torch.isfinite(a).all() & torch.isfinite(b).all())


@properties
@given(**shapes)
def test_factors_are_balanced(out: int, inner: int, seed: int) -> None:
    weight, gram = problem(out, inner, seed)
    rank = max(min(out, inner) // 2, 1)
    for a, b in (svd_factors(weight, rank), whitened_factors(weight, gram, rank)):
        assert torch.allclose(a.T @ a, b @ b.T, atol=1e-8)


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5)])
def test_degenerate_inputs(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    few = torch.randn(2, shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for matrix in (weight, torch.zeros_like(weight), weight[:1].expand(shape).contiguous()):
        for gram in (torch.zeros(shape[1], shape[1]), few.T @ few):
            a, b = whitened_factors(matrix, gram, 3)
            assert a.dtype == b.dtype == torch.float64
            assert torch.isfinite(a).all()
            assert torch.isfinite(b).all()
            # Two tokens need rank two at most, whatever the weight.
            assert gram_norm(matrix.double() - a @ b, gram.double()) <= 1e-5


def test_a_zero_gram_means_plain_svd() -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    plain, white = svd_factors(weight, 2), whitened_factors(weight, torch.zeros(4, 4), 2)
    assert torch.allclose(plain[0] @ plain[1], white[0] @ white[1], atol=1e-9)


@pytest.mark.parametrize("rank", [-1, 4])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(RecipeError, match=f"rank={rank}"):
        svd_factors(torch.ones(3, 5), rank)
    with pytest.raises(RecipeError, match=f"rank={rank}"):
        whitened_factors(torch.ones(3, 5), torch.eye(5), rank)
