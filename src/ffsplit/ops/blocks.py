"""The two sequential steps of rounding: column after column of a block, each one correcting those that follow.

On a GPU with Triton a block is one kernel; elsewhere, and in float64, it is a loop over columns in plain torch, which
is also the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ffsplit.ops.rounding import nearest_code

SettleColumn = Callable[[int, Float[Tensor, "ahead out"]], Float[Tensor, " out"]]
LARGEST = 64
"""Columns of a block that the kernel holds in registers."""


def round_block(
    values: Float[Tensor, "block out"],
    factor: Float[Tensor, "block block"],
    scale: Float[Tensor, "block out"],
    zero: Float[Tensor, "block out"],
    bits: int,
    codes: UInt8[Tensor, "block out"],
) -> Float[Tensor, "block out"]:
    """Round column after column, correcting the later ones of the block at once; fills ``codes``.

    Args:
        values: the weights, transposed; may be changed.
        factor: of the inverse Gram, upper triangular.
        scale: step of the grid.
        zero: code of 0.0.
        bits: width of a code.
        codes: to be filled.

    Returns:
        The scaled rounding errors that the columns after the block are still to be corrected for.
    """
    if _fits_kernel(values, factor, scale, zero):
        from ffsplit.ops import blocks_triton

        return blocks_triton.round_block(values, factor, scale, zero, bits, codes)

    def nearest(index: int, ahead: Float[Tensor, "ahead out"]) -> Float[Tensor, " out"]:
        code = nearest_code(ahead[0], scale[index], zero[index], bits)
        codes[index] = code
        return (code - zero[index]) * scale[index]

    return settle_block(values, factor, nearest)


def settle_block(
    values: Float[Tensor, "block out"], factor: Float[Tensor, "block block"], settle: SettleColumn
) -> Float[Tensor, "block out"]:
    """Decide column after column, correcting the later ones of the block at once.

    Args:
        values: the weights, transposed; changed in place, a decided row is left as it was when it was decided.
        factor: of the inverse Gram, upper triangular.
        settle: given a column of the block and its row with those that follow, all corrected so far, what the row
            becomes.

    Returns:
        The scaled errors that the columns after the block are still to be corrected for.
    """
    errors = torch.empty_like(values)
    for index in range(values.shape[0]):
        errors[index] = (values[index] - settle(index, values[index:])) / factor[index, index]
        values[index + 1 :].addr_(factor[index, index + 1 :], errors[index], alpha=-1)
    return errors


def descend(
    current: Float[Tensor, "block out"],
    gradient: Float[Tensor, "block out"],
    metric: Float[Tensor, "block block"],
    scale: Float[Tensor, "block out"],
    zero: Float[Tensor, "block out"],
    bits: int,
) -> Float[Tensor, "block out"]:
    """Best code of each column in turn, all others fixed; changes ``current``, returns the change of the weights.

    Args:
        current: codes as floats.
        gradient: of the error with respect to the weights, up to a factor; may be changed.
        metric: the block of the Gram.
        scale: step of the grid.
        zero: code of 0.0.
        bits: width of a code.
    """
    if _fits_kernel(current, gradient, metric, scale, zero):
        from ffsplit.ops import blocks_triton

        return blocks_triton.descend(current, gradient, metric, scale, zero, bits)
    moved = torch.empty_like(gradient)
    for index in range(len(current)):
        shift = ratio(gradient[index], metric[index, index])
        value = (current[index] - zero[index]) * scale[index]
        best = nearest_code(value + shift, scale[index], zero[index], bits)
        moved[index] = (best - current[index]) * scale[index]
        current[index] = best
        gradient.addr_(metric[index], moved[index], alpha=-1)
    return moved


def ratio(numerator: Float[Tensor, "..."], positive: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``numerator / positive``, zero where there is nothing to divide by."""
    return torch.where(positive > 0, numerator / torch.where(positive > 0, positive, 1.0), 0.0)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _fits_kernel(first: Tensor, *others: Tensor) -> bool:
    """Whether the kernel can work on these: float32 on a GPU, rows contiguous, a block that fits in registers."""
    return (
        first.is_cuda
        and _has_triton()
        and 0 < first.shape[0] <= LARGEST
        and first.shape[1] > 0
        and all(tensor.dtype == torch.float32 and tensor.stride(-1) == 1 for tensor in (first, *others))
    )
