"""The sequential steps of `blocks` as one kernel launch a block instead of several a column.

Rows of a weight are rounded independently of each other, so a program holds a block of columns of some rows in
registers and walks through the columns without leaving the chip. Imported only where Triton is and a GPU holds the
tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32
"""Weight rows a program works on."""


@triton.jit
def _nearest(value, scale, zero, top):
    """``clamp(round(value / scale) + zero, 0, top)``, halves to even; adding 1.5 * 2^23 rounds a float32."""
    quotient = tl.minimum(tl.maximum(tl.div_rn(value, scale), -4096.0), 4096.0)
    magic: tl.constexpr = 12582912.0
    rounded = (quotient + magic) - magic
    return tl.minimum(tl.maximum(rounded + zero, 0.0), top)


@triton.jit
def _round_kernel(
    values, factor, scale, zero, codes, errors, out, count, value_stride, factor_stride, scale_stride, zero_stride, top,
    B: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.arange(0, B)
    inside = (columns[:, None] < count) & (rows[None, :] < out)
    v = tl.load(values + columns[:, None] * value_stride + rows[None, :], inside, other=0.0)
    s = tl.load(scale + columns[:, None] * scale_stride + rows[None, :], inside, other=1.0)
    z = tl.load(zero + columns[:, None] * zero_stride + rows[None, :], inside, other=0.0)
    all_codes = tl.zeros((B, R), tl.float32)
    all_errors = tl.zeros((B, R), tl.float32)
    for index in range(count):
        here = (columns == index)[:, None]
        value = tl.sum(tl.where(here, v, 0.0), 0)
        step = tl.sum(tl.where(here, s, 0.0), 0)
        shift = tl.sum(tl.where(here, z, 0.0), 0)
        code = _nearest(value, step, shift, top)
        error = tl.div_rn(value - (code - shift) * step, tl.load(factor + index * factor_stride + index))
        later = (columns > index) & (columns < count)
        row = tl.load(factor + index * factor_stride + columns, later, other=0.0)
        v -= row[:, None] * error[None, :]
        all_codes = tl.where(here, code[None, :], all_codes)
        all_errors = tl.where(here, error[None, :], all_errors)
    flat = columns[:, None] * out + rows[None, :]
    tl.store(codes + flat, all_codes.to(tl.uint8), inside)
    tl.store(errors + flat, all_errors, inside)


@triton.jit
def _descend_kernel(
    current, gradient, metric, scale, zero, moved, out, count, current_stride, gradient_stride, metric_stride,
    scale_stride, zero_stride, top, B: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.arange(0, B)
    inside = (columns[:, None] < count) & (rows[None, :] < out)
    c = tl.load(current + columns[:, None] * current_stride + rows[None, :], inside, other=0.0)
    g = tl.load(gradient + columns[:, None] * gradient_stride + rows[None, :], inside, other=0.0)
    s = tl.load(scale + columns[:, None] * scale_stride + rows[None, :], inside, other=1.0)
    z = tl.load(zero + columns[:, None] * zero_stride + rows[None, :], inside, other=0.0)
    all_moved = tl.zeros((B, R), tl.float32)
    for index in range(count):
        here = (columns == index)[:, None]
        code = tl.sum(tl.where(here, c, 0.0), 0)
        slope = tl.sum(tl.where(here, g, 0.0), 0)
        step = tl.sum(tl.where(here, s, 0.0), 0)
        shift = tl.sum(tl.where(here, z, 0.0), 0)
        curvature = tl.load(metric + index * metric_stride + index)
        safe = tl.where(curvature > 0.0, curvature, 1.0)
        change = tl.where(curvature > 0.0, tl.div_rn(slope, safe), 0.0)
        best = _nearest((code - shift) * step + change, step, shift, top)
        move = (best - code) * step
        row = tl.load(metric + index * metric_stride + columns, columns < count, other=0.0)
        g -= row[:, None] * move[None, :]
        c = tl.where(here, best[None, :], c)
        all_moved = tl.where(here, move[None, :], all_moved)
    tl.store(current + columns[:, None] * current_stride + rows[None, :], c, inside)
    tl.store(moved + columns[:, None] * out + rows[None, :], all_moved, inside)


def round_block(values: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, bits: int, codes: Tensor) -> Tensor:
    """See :func:`ffsplit.ops.blocks.round_block`; rows of every tensor must be contiguous."""
    count, out = values.shape
    errors = torch.empty_like(values, memory_format=torch.contiguous_format)
    found = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    _round_kernel[(triton.cdiv(out, ROWS),)](
        values, factor, scale, zero, found, errors, out, count, values.stride(0), factor.stride(0), scale.stride(0),
        zero.stride(0), float(2**bits - 1), B=triton.next_power_of_2(count), R=ROWS,
    )  # fmt: skip
    codes.copy_(found)
    return errors


def descend(current: Tensor, gradient: Tensor, metric: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """See :func:`ffsplit.ops.blocks.descend`; rows of every tensor must be contiguous."""
    count, out = current.shape
    moved = torch.empty(current.shape, dtype=current.dtype, device=current.device)
    _descend_kernel[(triton.cdiv(out, ROWS),)](
        current, gradient, metric, scale, zero, moved, out, count, current.stride(0), gradient.stride(0),
        metric.stride(0), scale.stride(0), zero.stride(0), float(2**bits - 1), B=triton.next_power_of_2(count), R=ROWS,
    )  # fmt: skip
    return moved
