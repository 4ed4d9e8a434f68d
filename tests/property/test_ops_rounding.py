from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffsplit.errors import RecipeError
from ffsplit.ops.rounding import Grid, decode, encode, fit_grid, nearest_scale, round_to_nearest, storable_scale
from tests.property.amount import examples

properties = examples(60)
shapes = {
    "rows": st.integers(1, 6),
    "columns": st.integers(1, 40),
    "group": st.one_of(st.none(), st.integers(1, 48)),
    "scale_bits": st.sampled_from([8, 16]),
    "seed": st.integers(0, 2**20),
}


def random_weight(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    return (weight + torch.randn(rows, 1, generator=generator)).to(dtype)


@properties
@given(bits=st.integers(1, 8), symmetric=st.booleans(), **shapes)
def test_error_is_at_most_half_a_step(
    bits: int, symmetric: bool, rows: int, columns: int, group: int | None, scale_bits: int, seed: int
) -> None:
    weight = random_weight(rows, columns, seed)
    symmetric = symmetric and bits > 1
    codes, grid = round_to_nearest(weight, bits, group, symmetric=symmetric, scale_bits=scale_bits)
    step = grid.columns(columns)[0]
    assert int(codes.max()) < 2**bits
    assert int(grid.zero.max()) < 2**bits
    assert ((decode(codes, grid, torch.float32) - weight).abs() <= step * (0.5 + 1e-4)).all()


@properties
@given(bits=st.integers(1, 8), **shapes)
def test_search_never_loses_in_its_own_measure(
    bits: int, rows: int, columns: int, group: int | None, scale_bits: int, seed: int
) -> None:
    weight = random_weight(rows, columns, seed)
    importance = torch.rand(columns, generator=torch.Generator().manual_seed(seed)) + 0.01
    errors = []
    for search in (False, True):
        codes, grid = round_to_nearest(weight, bits, group, search=search, importance=importance, scale_bits=scale_bits)
        errors.append(((decode(codes, grid, torch.float32) - weight).square() * importance).sum())
    assert errors[1] <= errors[0] * (1 + 1e-5) + 1e-12


@properties
@given(bits=st.integers(1, 8), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float64]), **shapes)
def test_decoded_weights_encode_to_themselves(
    bits: int, dtype: torch.dtype, rows: int, columns: int, group: int | None, scale_bits: int, seed: int
) -> None:
    codes, grid = round_to_nearest(random_weight(rows, columns, seed, dtype), bits, group, scale_bits=scale_bits)
    assert torch.equal(encode(decode(codes, grid, torch.float32), grid, bits), codes)
    assert decode(codes, grid, dtype).dtype == dtype


@properties
@given(bits=st.integers(1, 7), **shapes)
def test_more_bits_give_a_finer_step(
    bits: int, rows: int, columns: int, group: int | None, scale_bits: int, seed: int
) -> None:
    weight = random_weight(rows, columns, seed)
    coarse, fine = (fit_grid(weight, b, group, scale_bits=scale_bits).scale for b in (bits, bits + 1))
    assert (fine <= coarse).all()


@properties
@given(value=st.floats(2.0**-24, 65504.0))
def test_scales_are_rounded_up_to_float16(value: float) -> None:
    stored = storable_scale(torch.tensor([value], dtype=torch.float64))
    assert stored.dtype == torch.float16
    assert stored.double() >= value
    assert stored.double() <= value * (1 + 2**-10) + 2**-24


@properties
@given(bits=st.integers(1, 8), search=st.booleans(), **shapes)
def test_8_bit_scales_are_what_is_stored(
    bits: int, search: bool, rows: int, columns: int, group: int | None, scale_bits: int, seed: int
) -> None:
    grid = fit_grid(random_weight(rows, columns, seed), bits, group, search=search, scale_bits=scale_bits)
    if scale_bits == 16:
        assert grid.row_scale is None
        assert grid.scale.dtype == torch.float16
        return
    assert grid.row_scale is not None
    assert int(grid.scale_codes.min()) >= 1
    assert torch.equal(grid.scale_codes.double() * grid.row_scale.double()[:, None] / 256, grid.scale.double())
    if not search:  # the widest group of each row uses (nearly) all of the range
        assert int(grid.scale_codes.amax(1).min()) >= 254
        free = fit_grid(random_weight(rows, columns, seed), bits, group).scale.double()
        widest = free.amax(1, keepdim=True)
        assert ((grid.scale.double() - free).abs() <= widest * (1 / 255 + 2**-9) + 2**-23).all()


def test_a_group_of_zeros_does_not_spoil_the_units_of_its_row() -> None:
    weight = torch.cat([torch.zeros(1, 4), torch.tensor([[1e-3, -2e-3, 3e-3, 1e-3]])], dim=1)
    codes, grid = round_to_nearest(weight, 4, 4, scale_bits=8)
    assert torch.equal(decode(codes, grid, torch.float32)[:, :4], torch.zeros(1, 4))
    assert float((decode(codes, grid, torch.float32) - weight).abs().max()) < 2e-4
    zeros = round_to_nearest(torch.zeros(2, 8), 3, 4, scale_bits=8)
    assert torch.equal(decode(*zeros, torch.float32), torch.zeros(2, 8))


@pytest.mark.parametrize("row_scale", [2.0**-24, 3e-5, 0.37, 65504.0])
def test_nearest_and_next_8_bit_scales_by_brute_force(row_scale: float) -> None:
    row = torch.tensor([row_scale]).half()
    lattice = torch.arange(1, 256).double() * row.double() / 256
    wanted = lattice[0] * torch.linspace(0.1, 260, 997, dtype=torch.float64)
    nearest = nearest_scale(wanted[None], row)[0].double()
    above = storable_scale(wanted[None], row)[0].double()
    distance = (lattice[:, None] - wanted).abs()
    assert torch.equal((nearest - wanted).abs(), distance.amin(0))
    expected = [min((s for s in lattice.tolist() if s >= w), default=float(lattice[-1])) for w in wanted.tolist()]
    assert above.tolist() == expected


def test_groups_are_contiguous_and_the_last_may_be_short() -> None:
    weight = torch.tensor([[1.0, -1.0, 10.0, 10.0, 0.5]])
    grid = fit_grid(weight, 4, 2)
    assert grid.group == 2
    assert grid.scale.shape == (1, 3)
    single = fit_grid(weight[:, 4:], 4, None)
    assert torch.equal(grid.scale[:, 2:], single.scale)


@pytest.mark.parametrize("values", [[0.0, 0.0], [3e-12, -1e-12], [1e30, -1e30]])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_extreme_groups_stay_finite(values: list[float], symmetric: bool, scale_bits: int) -> None:
    weight = torch.tensor([values])
    codes, grid = round_to_nearest(weight, 4, None, symmetric=symmetric, search=True, scale_bits=scale_bits)
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
    with pytest.raises(RecipeError, match="scale_bits=4"):
        fit_grid(weight, 4, 2, scale_bits=4)
    with pytest.raises(RecipeError, match="symmetric"):
        fit_grid(weight, 1, 2, symmetric=True)


def test_grid_spreads_over_columns() -> None:
    grid = Grid(torch.tensor([[1.0, 2.0]], dtype=torch.float16), torch.tensor([[3, 4]], dtype=torch.uint8), 3)
    scale, zero = grid.columns(5)
    assert scale.tolist() == [[1.0, 1.0, 1.0, 2.0, 2.0]]
    assert zero.tolist() == [[3.0, 3.0, 3.0, 4.0, 4.0]]
