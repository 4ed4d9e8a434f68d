from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffsplit.errors import RecipeError
from ffsplit.ops.rounding import Grid, decode, encode, fit_grid, round_to_nearest, storable_scale

properties = settings(deadline=None, derandomize=True, max_examples=60)
shapes = {
    "rows": st.integers(1, 6),
    "columns": st.integers(1, 40),
    "group": st.one_of(st.none(), st.integers(1, 48)),
    "seed": st.integers(0, 2**20),
}


def random_weight(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    return (weight + torch.randn(rows, 1, generator=generator)).to(dtype)


@properties
@given(bits=st.integers(1, 8), symmetric=st.booleans(), **shapes)
def test_error_is_at_most_half_a_step(
    bits: int, symmetric: bool, rows: int, columns: int, group: int | None, seed: int
) -> None:
    weight = random_weight(rows, columns, seed)
    symmetric = symmetric and bits > 1
    codes, grid = round_to_nearest(weight, bits, group, symmetric=symmetric)
    step = grid.columns(columns)[0]
    assert int(codes.max()) < 2**bits
    assert int(grid.zero.max()) < 2**bits
    assert ((decode(codes, grid, torch.float32) - weight).abs() <= step * (0.5 + 1e-4)).all()


@properties
@given(bits=st.integers(1, 8), **shapes)
def test_search_never_loses_in_its_own_measure(
    bits: int, rows: int, columns: int, group: int | None, seed: int
) -> None:
    weight = random_weight(rows, columns, seed)
    importance = torch.rand(columns, generator=torch.Generator().manual_seed(seed)) + 0.01
    errors = []
    for search in (False, True):
        codes, grid = round_to_nearest(weight, bits, group, search=search, importance=importance)
        errors.append(((decode(codes, grid, torch.float32) - weight).square() * importance).sum())
    assert errors[1] <= errors[0] * (1 + 1e-5) + 1e-12


@properties
@given(bits=st.integers(1, 8), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float64]), **shapes)
def test_decoded_weights_encode_to_themselves(
    bits: int, dtype: torch.dtype, rows: int, columns: int, group: int | None, seed: int
) -> None:
    codes, grid = round_to_nearest(random_weight(rows, columns, seed, dtype), bits, group)
    assert torch.equal(encode(decode(codes, grid, torch.float32), grid, bits), codes)
    assert decode(codes, grid, dtype).dtype == dtype


@properties
@given(bits=st.integers(1, 7), **shapes)
def test_more_bits_give_a_finer_step(bits: int, rows: int, columns: int, group: int | None, seed: int) -> None:
    weight = random_weight(rows, columns, seed)
    assert (fit_grid(weight, bits + 1, group).scale <= fit_grid(weight, bits, group).scale).all()


@properties
@given(value=st.floats(2.0**-24, 65504.0))
def test_scales_are_rounded_up_to_float16(value: float) -> None:
    stored = storable_scale(torch.tensor([value], dtype=torch.float64))
    assert stored.dtype == torch.float16
    assert stored.double() >= value
    assert stored.double() <= value * (1 + 2**-10) + 2**-24


def test_groups_are_contiguous_and_the_last_may_be_short() -> None:
    weight = torch.tensor([[1.0, -1.0, 10.0, 10.0, 0.5]])
    grid = fit_grid(weight, 4, 2)
    assert grid.group == 2
    assert grid.scale.shape == (1, 3)
    single = fit_grid(weight[:, 4:], 4, None)
    assert torch.equal(grid.scale[:, 2:], single.scale)


@pytest.mark.parametrize("values", [[0.0, 0.0], [3e-12, -1e-12], [1e30, -1e30]])
@pytest.mark.parametrize("symmetric", [False, True])
def test_extreme_groups_stay_finite(values: list[float], symmetric: bool) -> None:
    weight = torch.tensor([values])
    codes, grid = round_to_nearest(weight, 4, None, symmetric=symmetric, search=True)
    assert torch.isfinite(grid.scale).all()
    assert (grid.scale > 0).all()
    assert torch.isfinite(decode(codes, grid, torch.float32)).all()


def test_zero_weights_decode_to_zero() -> None:
    codes, grid = round_to_nearest(torch.zeros(2, 7), 3, 4)
    assert torch.equal(decode(codes, grid, torch.float32), torch.zeros(2, 7))


def test_impossible_requests_are_refused() -> None:
    weight = torch.ones(2, 4)
    with pytest.raises(RecipeError, match="bits=9"):
        fit_grid(weight, 9, 2)
    with pytest.raises(RecipeError, match="group=0"):
        fit_grid(weight, 4, 0)
    with pytest.raises(RecipeError, match="symmetric"):
        fit_grid(weight, 1, 2, symmetric=True)


def test_grid_spreads_over_columns() -> None:
    grid = Grid(torch.tensor([[1.0, 2.0]], dtype=torch.float16), torch.tensor([[3, 4]], dtype=torch.uint8), 3)
    scale, zero = grid.columns(5)
    assert scale.tolist() == [[1.0, 1.0, 1.0, 2.0, 2.0]]
    assert zero.tolist() == [[3.0, 3.0, 3.0, 4.0, 4.0]]
