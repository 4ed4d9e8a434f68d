"""The reference forward of a packed low-bit matrix: unpack, dequantise, multiply."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor
from torch.nn.functional import linear

from ffsplit.ops.packing import unpack
from ffsplit.ops.rounding import scale_unit


def dequantize(
    packed: UInt8[Tensor, "out packed_in"],
    scale_bits: Integer[Tensor, "out groups"],
    packed_zero: UInt8[Tensor, " packed_zeros"] | None,
    *,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
    row_scale: Int[Tensor, " out"] | None = None,
    input_scale: Int[Tensor, " columns"] | None = None,
) -> Float[Tensor, "out columns"]:
    """Dense weights ``scale * (code - zero)`` of a packed matrix.

    Args:
        packed: codes, packed by :func:`ffsplit.ops.packing.pack`.
        scale_bits: float16 scales as int16 bit patterns, so that casting a model never rounds them; or, with
            ``row_scale``, uint8 multiples of the row's unit.
        packed_zero: zeros of all rows and groups, packed as one row; None is a symmetric grid at ``2 ** (bits - 1)``.
        bits: bits per code.
        group: consecutive input columns that share a scale; the last group may be short.
        columns: input columns.
        dtype: floating-point type of the result.
        row_scale: 256 units of each row's 8-bit scales, float16 as int16 bit patterns.
        input_scale: a factor of each column, float16 as int16 bit patterns.
    """
    groups = scale_bits.shape[1]
    codes = unpack(packed, bits, columns)
    # bfloat16 cannot hold a float16 scale (nor float16 a multiple of a unit): rounding it first would shift all weights
    # of a group the same way.
    plain = row_scale is None and input_scale is None
    work = dtype if dtype == torch.float16 and plain else torch.promote_types(dtype, torch.float32)
    scale = decoded_scale(scale_bits, row_scale).to(work)
    if packed_zero is None:
        zero = torch.full((), 2 ** (bits - 1), dtype=work, device=packed.device).expand_as(scale)
    else:
        zero = unpack(packed_zero, bits, scale.numel()).view_as(scale).to(work)
    if groups * group == columns:
        grouped = codes.view(-1, groups, group).to(work)
        weight = ((grouped - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).view(-1, columns)
    else:
        scale = scale.repeat_interleave(group, dim=1)[:, :columns]
        zero = zero.repeat_interleave(group, dim=1)[:, :columns]
        weight = (codes.to(work) - zero) * scale
    return weight.to(dtype) if input_scale is None else (weight * input_scale.view(torch.float16).to(work)).to(dtype)


def decoded_scale(
    scale_bits: Integer[Tensor, "out groups"], row_scale: Int[Tensor, " out"] | None
) -> Float[Tensor, "out groups"]:
    """Stored scales as numbers: float16 ones, or exact float32 products of a code and its row's unit."""
    if row_scale is None:
        return scale_bits.view(torch.float16)
    return scale_bits.float() * scale_unit(row_scale.view(torch.float16))


def packed_linear(
    x: Float[Tensor, "*tokens columns"],
    packed: UInt8[Tensor, "out packed_in"],
    scale_bits: Integer[Tensor, "out groups"],
    packed_zero: UInt8[Tensor, " packed_zeros"] | None,
    *,
    bits: int,
    group: int,
    row_scale: Int[Tensor, " out"] | None = None,
    input_scale: Int[Tensor, " columns"] | None = None,
) -> Float[Tensor, "*tokens out"]:
    """``x W^T`` for a packed ``W``; gradients flow to ``x``."""
    weight = dequantize(
        packed,
        scale_bits,
        packed_zero,
        bits=bits,
        group=group,
        columns=x.shape[-1],
        dtype=x.dtype,
        row_scale=row_scale,
        input_scale=input_scale,
    )
    return linear(x, weight)
