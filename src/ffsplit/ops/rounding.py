"""Grouped round-to-nearest: codes of 1 to 8 bits with a float16 scale and an integer zero point per group.

``weight ~ (code - zero) * scale``. Groups are contiguous runs along the input dimension of a ``[out, in]`` weight; the
last may be short. Scales are rounded to float16 *before* the codes are computed, so that what is stored is what was
fitted.
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


@dataclass(frozen=True)
class Grid:
    """Where the codes of a weight lie.

    Attributes:
        scale: step per row and group, > 0.
        zero: the code that means 0.0, per row and group, in ``0..2**bits - 1``.
        group: columns per group; the last group may be short.
    """

    scale: Float16[Tensor, "out groups"]
    zero: UInt8[Tensor, "out groups"]
    group: int

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

    Raises:
        RecipeError: ``bits``, ``group`` or the combination of ``symmetric`` with 1 bit is not possible.
    """
    _check_bits(bits, symmetric)
    size = group_size(weight.shape[1], group)
    grouped = _grouped(_working(weight), size)
    scale, zero = _covering_range(grouped, bits, symmetric)
    if search and weight.numel():
        cost = None if importance is None else _grouped(importance.to(grouped).expand(weight.shape), size)
        scale = _search_scale(grouped, scale, zero, bits, steps, cost)
    return Grid(scale, zero.to(torch.uint8), size)


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
) -> tuple[UInt8[Tensor, "out in"], Grid]:
    """`fit_grid`, then `encode`: the baseline of every rounding method."""
    grid = fit_grid(weight, bits, group, symmetric=symmetric, search=search, importance=importance)
    return encode(weight, grid, bits), grid


def nearest_code(
    weight: Float[Tensor, "..."], scale: Float[Tensor, "..."], zero: Float[Tensor, "..."], bits: int
) -> Float[Tensor, "..."]:
    """The code nearest to each weight, as a float; shapes broadcast."""
    return (torch.round(weight / scale) + zero).clamp(0, 2**bits - 1)


def storable_scale(scale: Float[Tensor, "*shape"]) -> Float16[Tensor, "*shape"]:
    """The float16 next above each positive scale (so that no range shrinks), within the finite float16 numbers."""
    bounded = scale.clamp(SMALLEST_SCALE, LARGEST_SCALE)
    half = bounded.to(torch.float16)
    # Positive float16 numbers are ordered as their bit patterns are.
    return (half.view(torch.int16) + (half.to(bounded.dtype) < bounded).to(torch.int16)).view(torch.float16)


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


def _covering_range(
    grouped: Float[Tensor, "out groups group"], bits: int, symmetric: bool
) -> tuple[Float16[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """The smallest storable scale, and the zero point, whose range covers every value of the group and 0.0."""
    low, high = grouped.amin(-1).clamp_max(0.0), grouped.amax(-1).clamp_min(0.0)
    if symmetric:
        half = 2 ** (bits - 1)
        scale = torch.maximum(-low / half, high / (half - 1))
    else:
        scale = (high - low) / (2**bits - 1)
    stored = storable_scale(torch.where(scale > 0, scale, 1.0))
    if symmetric:
        return stored, torch.full_like(scale, half)
    return stored, torch.round(-low / stored).clamp(0, 2**bits - 1)


def _search_scale(
    grouped: Float[Tensor, "out groups group"],
    scale: Float16[Tensor, "out groups"],
    zero: Float[Tensor, "out groups"],
    bits: int,
    steps: int,
    cost: Float[Tensor, "out groups group"] | None,
) -> Float16[Tensor, "out groups"]:
    """Per group the scale, among ``steps`` fractions of the covering one, with the least weighted squared error."""
    best_scale, best_error = scale, torch.full(scale.shape, torch.inf, dtype=grouped.dtype, device=grouped.device)
    first, last = SHRINK_RANGE
    for step in range(steps):
        fraction = first + (last - first) * step / max(steps - 1, 1)
        candidate = scale if step == 0 else storable_scale(scale.to(grouped.dtype) * fraction)
        step_size = candidate.to(grouped.dtype)[..., None]
        rounded = nearest_code(grouped, step_size, zero[..., None], bits).sub_(zero[..., None]).mul_(step_size)
        error = rounded.sub_(grouped).square_()
        total = (error if cost is None else error.mul_(cost)).sum(-1)
        better = total < best_error
        best_scale, best_error = torch.where(better, candidate, best_scale), torch.where(better, total, best_error)
    return best_scale
