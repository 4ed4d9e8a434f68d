from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffsplit.ffn.projections import Packed
from ffsplit.ops.gptq import Order, gptq, inverse_factor
from ffsplit.ops.refine import output_error, refine, refine_codes, refine_scales
from ffsplit.ops.rounding import Grid, decode, round_to_nearest
from tests.property.amount import examples

properties = examples(40)
shapes = {
    "bits": st.integers(1, 8),
    "rows": st.integers(1, 6),
    "columns": st.integers(1, 40),
    "group": st.one_of(st.none(), st.integers(1, 48)),
    "scale_bits": st.sampled_from([8, 16]),
    "seed": st.integers(0, 2**20),
}
orders = st.sampled_from(["natural", "descending"])


def layer(rows: int, columns: int, seed: int, tokens: int = 100) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, columns)
    return weight, x.T @ x


def error(weight: Tensor, result: tuple[Tensor, Grid], gram: Tensor) -> float:
    return float(output_error(weight, decode(*result, torch.float64), gram))


@pytest.mark.parametrize("order", ["natural", "descending"])
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, None])
def test_gptq_beats_round_to_nearest(order: Order, search: bool, bits: int, group: int | None) -> None:
    for seed in range(3):
        weight, gram = layer(48, 96, seed, tokens=300)
        plain = round_to_nearest(weight, bits, group, search=search)
        assert error(weight, gptq(weight, gram, bits, group, order=order, search=search), gram) < 0.7 * error(
            weight, plain, gram
        )


@properties
@given(order=orders, symmetric=st.booleans(), **shapes)
def test_identity_gram_is_round_to_nearest(
    order: Order, symmetric: bool, bits: int, rows: int, columns: int, group: int | None, scale_bits: int, seed: int
) -> None:
    weight, _ = layer(rows, columns, seed)
    symmetric = symmetric and bits > 1
    options = {"symmetric": symmetric, "search": False, "scale_bits": scale_bits}
    codes, grid = gptq(weight, torch.eye(columns), bits, group, order=order, **options)
    expected, expected_grid = round_to_nearest(weight, bits, group, **options)
    assert torch.equal(codes, expected)
    assert torch.equal(grid.scale, expected_grid.scale)
    assert torch.equal(grid.zero, expected_grid.zero)
    assert grid.group == expected_grid.group


@properties
@given(order=orders, tokens=st.integers(0, 5), damp=st.sampled_from([0.0, 0.01]), **shapes)
def test_singular_grams_and_dead_inputs_give_finite_codes(
    order: Order,
    tokens: int,
    damp: float,
    bits: int,
    rows: int,
    columns: int,
    group: int | None,
    scale_bits: int,
    seed: int,
) -> None:
    weight, gram = layer(rows, columns, seed, tokens)
    gram[0], gram[:, 0] = 0.0, 0.0
    codes, grid = gptq(weight, gram, bits, group, order=order, damp=damp, scale_bits=scale_bits)
    assert codes.shape == weight.shape
    assert int(codes.max()) < 2**bits
    assert torch.isfinite(grid.scale).all()
    assert torch.isfinite(decode(codes, grid, torch.float32)).all()


@properties
@given(order=orders, block=st.integers(1, 50), **shapes)
def test_block_size_changes_no_result(
    order: Order, block: int, bits: int, rows: int, columns: int, group: int | None, scale_bits: int, seed: int
) -> None:
    weight, gram = layer(rows, columns, seed)
    first, first_grid = gptq(weight.double(), gram, bits, group, order=order, block=block, scale_bits=scale_bits)
    second, second_grid = gptq(weight.double(), gram, bits, group, order=order, scale_bits=scale_bits)
    assert torch.equal(first, second)
    assert torch.equal(first_grid.scale, second_grid.scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_any_dtype_and_any_scale_of_the_gram(dtype: torch.dtype, factor: float) -> None:
    weight, gram = layer(5, 20, 0)
    weight = weight.to(dtype)
    expected, _ = gptq(weight, gram, 3, 8)
    assert torch.equal(gptq(weight, gram * factor, 3, 8)[0], expected)


@properties
@given(columns=st.integers(1, 30), seed=st.integers(0, 2**20))
def test_inverse_factor(columns: int, seed: int) -> None:
    _, gram = layer(1, columns, seed)
    factor = inverse_factor(gram, 0.01)
    shifted = gram + 0.01 * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor @ shifted, torch.eye(columns, dtype=torch.float64), atol=1e-8)


@properties
@given(tokens=st.integers(0, 60), sweeps=st.integers(1, 3), **shapes)
def test_refinement_never_raises_the_error(
    tokens: int, sweeps: int, bits: int, rows: int, columns: int, group: int | None, scale_bits: int, seed: int
) -> None:
    weight, gram = layer(rows, columns, seed, tokens)
    gram[0], gram[:, 0] = 0.0, 0.0
    codes, grid = round_to_nearest(weight, bits, group, scale_bits=scale_bits)
    slack = 1e-5 * float(output_error(weight, torch.zeros_like(weight), gram))
    errors = [error(weight, (codes, grid), gram)]
    for _ in range(sweeps):
        grid = refine_scales(weight, codes, grid, gram)
        errors.append(error(weight, (codes, grid), gram))
        codes = refine_codes(weight, codes, grid, gram, bits)
        errors.append(error(weight, (codes, grid), gram))
        assert int(codes.max()) < 2**bits
        assert (grid.scale > 0).all()
        assert (grid.row_scale is None) == (scale_bits == 16)
    assert all(after <= before + slack for before, after in itertools.pairwise(errors))


@properties
@given(block=st.integers(1, 50), **shapes)
def test_refined_codes_are_a_coordinatewise_optimum(
    block: int, bits: int, rows: int, columns: int, group: int | None, scale_bits: int, seed: int
) -> None:
    weight, gram = layer(rows, columns, seed)
    weight = weight.double()
    codes, grid = round_to_nearest(weight, bits, group, scale_bits=scale_bits)
    codes = refine_codes(weight, codes, grid, gram, bits, sweeps=30, block=block)
    best = error(weight, (codes, grid), gram)
    column = seed % columns
    for step in (-1, 1):
        moved = codes.int()
        moved[:, column] = (moved[:, column] + step).clamp(0, 2**bits - 1)
        for row in range(rows):
            single = codes.clone()
            single[row, column] = moved[row, column]
            assert error(weight, (single, grid), gram) >= best * (1 - 1e-9)


def test_refined_scales_solve_the_least_squares_problem() -> None:
    weight, gram = layer(4, 12, 0)
    weight = weight.double()
    codes, grid = round_to_nearest(weight, 4, 4)
    refined = refine_scales(weight, codes, grid, gram, sweeps=300)
    steps = codes.double() - grid.columns(12)[1]
    for row in range(4):
        columns = torch.block_diag(*steps[row].reshape(3, 1, 4)).double()
        best = torch.linalg.solve(columns @ gram @ columns.T, columns @ gram @ weight[row])
        assert torch.allclose(refined.scale[row].double(), best, rtol=3e-2)


def test_refined_8_bit_scales_are_stored_ones_and_cost_little() -> None:
    """Little next to float16 scales: at 2 bits a hundredth of a step is not what hurts."""
    weight, gram = layer(32, 96, 6, tokens=400)
    errors = {}
    for scale_bits in (8, 16):
        codes, grid = refine(weight, *gptq(weight, gram, 2, 16, scale_bits=scale_bits), gram, 2)
        packed = Packed.from_codes(codes, grid, bits=2, group=16)
        assert packed.spec.scale_bits == scale_bits
        assert torch.equal(packed.dense(torch.float64), decode(codes, grid, torch.float64))
        errors[scale_bits] = error(weight, (codes, grid), gram)
    assert errors[8] < 1.1 * errors[16]


def test_refinement_improves_gptq_a_lot_at_low_bits() -> None:
    weight, gram = layer(32, 96, 5, tokens=400)
    start = gptq(weight, gram, 2, 16)
    assert error(weight, refine(weight, *start, gram, 2), gram) < 0.9 * error(weight, start, gram)


def test_dead_inputs_keep_their_codes() -> None:
    weight, gram = layer(3, 10, 0)
    gram[4], gram[:, 4] = 0.0, 0.0
    codes, grid = round_to_nearest(weight, 3, 5)
    assert torch.equal(refine_codes(weight, codes, grid, gram, 3, sweeps=3)[:, 4], codes[:, 4])
    assert refine_scales(weight, codes, grid, torch.zeros(10, 10)) is not grid
    assert torch.equal(refine_scales(weight, codes, grid, torch.zeros(10, 10)).scale, grid.scale)
