"""Grouped round-to-nearest: codes of 1 to 8 bits with a float16 scale and an integer zero point per group.

``weight ~ (code - zero) * scale``. Groups are contiguous runs along the input dimension of a ``[out, in]`` weight; the
last may be short. Scales are rounded to what can be stored *before* the codes are computed, so that what is stored is
what was fitted: float16 numbers, or with 8-bit scales multiples 1 to 255 of a unit that the groups of a row share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, UInt8
from torch import Tensor
from torch.nn.functional import pad

from ffsplit.errors import RecipeError

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
LARGEST_SCALE = 65504.0
SHRINK_RANGE = (1.0, 0.3)
# A power of two, so that unit and scale are exact in float32 on every device; the largest code is one less.
SCALE_UNITS = 256


@dataclass(frozen=True)
class Grid:
    """Where the codes of a weight lie.

    Attributes:
        scale: step per row and group, > 0; float16, or float32 if ``row_scale`` is there.
        zero: the code that means 0.0, per row and group, in ``0..2**bits - 1``.
        group: columns per group; the last group may be short.
        row_scale: each scale is one of 1 to 255 times ``row_scale / 256``; None: each is a float16 of its own.
    """

    scale: Float[Tensor, "out groups"]
    zero: UInt8[Tensor, "out groups"]
    group: int
    row_scale: Float16[Tensor, " out"] | None = None

    @property
    def scale_codes(self) -> UInt8[Tensor, "out groups"]:
        """The scales in units of their row; only where there is a ``row_scale``."""
        assert self.row_scale is not None
        return torch.round(self.scale / scale_unit(self.row_scale)).to(torch.uint8)

    def columns(self, count: int) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out in"]]:
        """Scale and zero of each of ``count`` columns, float32."""
        scale, zero = self.scale.float(), self.zero.float()
        return _spread(scale, count, self.group), _spread(zero, count, self.group)


def group_size(columns: int, group: int | None) -> int:
    """The group size that is meant: one group per row for None or for a group wider than the row.

    Raises:
        RecipeError: ``group`` is below 1.
    """
    if group is not None and group < 1:
        raise RecipeError(f"group={group}: a group has at least one column, or is None for one group per row")
    whole = max(columns, 1)
    return whole if group is None else min(group, whole)


def fit_grid(
    weight: Float[Tensor, "out in"],
    bits: int,
    group: int | None,
    *,
    symmetric: bool = False,
    search: bool = False,
    steps: int = 36,
    importance: Float[Tensor, "... in"] | None = None,
    scale_bits: int = 16,
    row_scale: Float16[Tensor, " out"] | None = None,
) -> Grid:
    """Fit scale and zero point to every group of a weight.

    Args:
        weight: finite values of any float dtype.
        bits: 1 to 8.
        group: columns per group, or None for one group per row.
        symmetric: fix the zero point at ``2**(bits - 1)``; needs at least 2 bits.
        search: besides the range that covers all values, try smaller ones and keep, per group, the one with the least
            (weighted) squared error.
        steps: number of ranges tried by the search, from the full one down to 0.3 of it.
        importance: weight of each column's squared error, such as the diagonal of the Gram of the inputs; per row too
            if two-dimensional.
        scale_bits: 16 (float16 scales) or 8 (multiples of a unit per row, which the widest group of the row decides).
        row_scale: with 8-bit scales, units that are given already; ranges beyond 255 units are cut off.

    Raises:
        RecipeError: ``bits``, ``group``, ``scale_bits`` or the combination of ``symmetric`` with 1 bit is not possible.
    """
    _check_bits(bits, symmetric)
    if scale_bits not in (8, 16):
        raise RecipeError(f"scale_bits={scale_bits} is neither 8 nor 16")
    size = group_size(weight.shape[1], group)
    grouped = _grouped(_working(weight), size)
    covering = _covering_scale(grouped, bits, symmetric)
    if scale_bits == 8 and row_scale is None:
        row_scale = _row_scale(covering)
    if row_scale is None:
        covering = torch.where(covering > 0, covering, 1.0)
    scale = storable_scale(covering, row_scale)
    zero = _zero_point(grouped, scale, bits, symmetric)
    if search and weight.numel():
        cost = None if importance is None else _grouped(importance.to(grouped).expand(weight.shape), size)
        scale = _search_scale(grouped, scale, zero, bits, steps, cost, row_scale)
    return Grid(scale, zero.to(torch.uint8), size, row_scale)


def encode(weight: Float[Tensor, "out in"], grid: Grid, bits: int) -> UInt8[Tensor, "out in"]:
    """The nearest code of every weight; values outside the range get the code at its end."""
    scale, zero = grid.columns(weight.shape[1])
    return nearest_code(_working(weight), scale, zero, bits).to(torch.uint8)


def decode(codes: UInt8[Tensor, "out in"], grid: Grid, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """The weight that the codes stand for, computed in float32 (float64 if asked for) and cast to ``dtype``."""
    scale, zero = grid.columns(codes.shape[1])
    return ((codes.float() - zero).to(torch.promote_types(dtype, torch.float32)) * scale).to(dtype)


def round_to_nearest(
    weight: Float[Tensor, "out in"],
    bits: int,
    group: int | None,
    *,
    symmetric: bool = False,
    search: bool = False,
    importance: Float[Tensor, "... in"] | None = None,
    scale_bits: int = 16,
) -> tuple[UInt8[Tensor, "out in"], Grid]:
    """`fit_grid`, then `encode`: the baseline of every rounding method."""
    grid = fit_grid(
        weight, bits, group, symmetric=symmetric, search=search, importance=importance, scale_bits=scale_bits
    )
    return encode(weight, grid, bits), grid


def nearest_code(
    weight: Float[Tensor, "..."], scale: Float[Tensor, "..."], zero: Float[Tensor, "..."], bits: int
) -> Float[Tensor, "..."]:
    """The code nearest to each weight, as a float; shapes broadcast."""
    return (torch.round(weight / scale) + zero).clamp(0, 2**bits - 1)


def scale_unit(row_scale: Float16[Tensor, " out"]) -> Float[Tensor, "out 1"]:
    """What the 8-bit scales of each row are multiples of, float32."""
    return (row_scale.float() / SCALE_UNITS)[:, None]


def nearest_scale(
    scale: Float[Tensor, "*shape"], row_scale: Float16[Tensor, " out"] | None = None
) -> Float[Tensor, "*shape"]:
    """The storable scale nearest to each: a float16, or with ``row_scale`` (shape ``[out, groups]``) float32."""
    if row_scale is None:
        return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16)
    unit = scale_unit(row_scale)
    return torch.round(scale / unit).clamp(1, SCALE_UNITS - 1).float() * unit


def storable_scale(
    scale: Float[Tensor, "*shape"], row_scale: Float16[Tensor, " out"] | None = None
) -> Float[Tensor, "*shape"]:
    """The storable scale next above each (so that no range shrinks), within what can be stored.

    A finite float16; or with ``row_scale`` (and shape ``[out, groups]``) a multiple of the row's unit, float32.
    """
    if row_scale is not None:
        unit = scale_unit(row_scale)
        return torch.ceil(scale / unit).clamp(1, SCALE_UNITS - 1).float() * unit
    bounded = scale.clamp(SMALLEST_SCALE, LARGEST_SCALE)
    half = bounded.to(torch.float16)
    # Positive float16 numbers are ordered as their bit patterns are.
    return (half.view(torch.int16) + (half.to(bounded.dtype) < bounded).to(torch.int16)).view(torch.float16)


def storable_row_scale(weight: Float[Tensor, "out in"], largest: int | float) -> Float16[Tensor, " out"]:
    """The least storable scale of every row at which its largest value is at most ``largest``; rows of zeros have 1."""
    rows, columns = weight.shape
    reached = weight.abs().amax(1).double() if columns else weight.new_zeros(rows).double()
    return storable_scale(torch.where(reached > 0, reached / largest, 1.0))


def _check_bits(bits: int, symmetric: bool) -> None:
    if not 1 <= bits <= 8:
        raise RecipeError(f"bits={bits} is not in 1..8")
    if symmetric and bits == 1:
        raise RecipeError("bits=1 with symmetric=True leaves no positive level; use at least 2 bits or asymmetric")


def _working(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Float32, or float64 if the weight is."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _grouped(values: Float[Tensor, "out in"], size: int) -> Float[Tensor, "out groups group"]:
    """Columns in groups; a short last group is filled up with zeros, which every range contains."""
    filled = pad(values, (0, -values.shape[1] % size))
    return filled.reshape(values.shape[0], filled.shape[1] // size, size)


def _spread(values: Float[Tensor, "out groups"], count: int, size: int) -> Float[Tensor, "out in"]:
    return values.repeat_interleave(size, dim=1)[:, :count]


def _covering_scale(
    grouped: Float[Tensor, "out groups group"], bits: int, symmetric: bool
) -> Float[Tensor, "out groups"]:
    """The smallest scale whose range covers every value of the group and 0.0; zero for a group of zeros."""
    low, high = _range(grouped)
    if symmetric:
        half = 2 ** (bits - 1)
        return torch.maximum(-low / half, high / (half - 1))
    scale: Tensor = (high - low) / (2**bits - 1)
    return scale


def _range(
    grouped: Float[Tensor, "out groups group"],
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """The least and the greatest of each group's values and 0.0."""
    return grouped.amin(-1).clamp_max(0.0), grouped.amax(-1).clamp_min(0.0)


def _row_scale(covering: Float[Tensor, "out groups"]) -> Float16[Tensor, " out"]:
    """So that 255 units cover the widest group of each row; one for a row of zeros."""
    widest = covering.amax(1) if covering.shape[1] else covering.new_zeros(covering.shape[0])
    return storable_scale(torch.where(widest > 0, widest * SCALE_UNITS / (SCALE_UNITS - 1), 1.0))


def _zero_point(
    grouped: Float[Tensor, "out groups group"], scale: Float[Tensor, "out groups"], bits: int, symmetric: bool
) -> Float[Tensor, "out groups"]:
    """The code that means 0.0."""
    if symmetric:
        return torch.full_like(scale, 2 ** (bits - 1), dtype=grouped.dtype)
    return torch.round(-_range(grouped)[0] / scale).clamp(0, 2**bits - 1)


def _search_scale(
    grouped: Float[Tensor, "out groups group"],
    scale: Float[Tensor, "out groups"],
    zero: Float[Tensor, "out groups"],
    bits: int,
    steps: int,
    cost: Float[Tensor, "out groups group"] | None,
    row_scale: Float16[Tensor, " out"] | None,
) -> Float[Tensor, "out groups"]:
    """Per group the scale, among ``steps`` fractions of the covering one, with the least weighted squared error."""
    best_scale, best_error = scale, torch.full(scale.shape, torch.inf, dtype=grouped.dtype, device=grouped.device)
    first, last = SHRINK_RANGE
    for step in range(steps):
        fraction = first + (last - first) * step / max(steps - 1, 1)
        candidate = scale if step == 0 else storable_scale(scale.to(grouped.dtype) * fraction, row_scale)
        step_size = candidate.to(grouped.dtype)[..., None]
        rounded = nearest_code(grouped, step_size, zero[..., None], bits).sub_(zero[..., None]).mul_(step_size)
        error = rounded.sub_(grouped).square_()
        total = (error if cost is None else error.mul_(cost)).sum(-1)
        better = total < best_error
        best_scale, best_error = torch.where(better, candidate, best_scale), torch.where(better, total, best_error)
    return best_scale
