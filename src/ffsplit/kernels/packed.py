"""The forwards of a packed low-bit matrix.

The reference unpacks, dequantises and multiplies, anywhere. :func:`ffsplit.kernels.dispatch.packed_path` tells when
another way is taken, and each keeps what it makes of the stored matrix in a :class:`DerivedCache`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor
from torch.nn.functional import linear

from ffsplit.kernels.cache import DerivedCache, counted
from ffsplit.kernels.cpu import product_dtype
from ffsplit.kernels.cpu_int4 import Int4Parts, int4_linear, int4_matrix, int4_parts, is_precise_enough
from ffsplit.kernels.dispatch import Path, as_autocast, may_round, packed_path
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


@dataclass(frozen=True)
class PackedTensors:
    """What is stored of a packed matrix; see :func:`dequantize` for the parts."""

    packed: UInt8[Tensor, "out packed_in"]
    scale_bits: Integer[Tensor, "out groups"]
    packed_zero: UInt8[Tensor, " packed_zeros"] | None
    row_scale: Int[Tensor, " out"] | None
    input_scale: Int[Tensor, " columns"] | None
    bits: int
    group: int
    columns: int

    @property
    def sources(self) -> tuple[Tensor | None, ...]:
        return self.packed, self.scale_bits, self.packed_zero, self.row_scale, self.input_scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.columns

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out columns"]:
        """Decoded."""
        return dequantize(
            self.packed,
            self.scale_bits,
            self.packed_zero,
            bits=self.bits,
            group=self.group,
            columns=self.columns,
            dtype=dtype,
            row_scale=self.row_scale,
            input_scale=self.input_scale,
        )

    def int4(self) -> Int4Parts:
        """For torch's int4 kernel, without the factors of the inputs."""
        scale = decoded_scale(self.scale_bits, self.row_scale).float()
        if self.packed_zero is None:
            zero = torch.full_like(scale, 2 ** (self.bits - 1))
        else:
            zero = unpack(self.packed_zero, self.bits, scale.numel()).view_as(scale).float()
        codes = unpack(self.packed, self.bits, self.columns)
        return int4_parts(codes, scale, zero, bits=self.bits, group=self.group)


def packed_linear(
    x: Float[Tensor, "*tokens columns"], matrix: PackedTensors, cache: DerivedCache
) -> Float[Tensor, "*tokens out"]:
    """``x W^T`` for a packed ``W``, by whichever way is the fastest for so many tokens; gradients flow to ``x``.

    What is kept beside the stored codes: for the int4 kernel half a byte a weight (one above 4 bits), made when few
    tokens first come; for many tokens the decoded matrix in the dtype of ``x``, or the one in which the CPU multiplies
    fastest, as far as :func:`ffsplit.kernels.cache.set_decoded_limit` leaves room for it.
    """
    path = packed_path(x, matrix.shape, bits=matrix.bits, group=matrix.group, sources=matrix.sources)
    if path is Path.REFERENCE:
        return linear(x, matrix.dense(x.dtype))
    inputs = as_autocast(x)
    if path is Path.CPU_INT4:
        if matrix.input_scale is not None:
            inputs = (inputs.float() * matrix.input_scale.view(torch.float16).float()).to(inputs.dtype)
        return int4_linear(inputs, cache.get(path, matrix.sources, lambda: int4_matrix(matrix.int4())))
    # Autocast would cast the decoded matrix at every forward.
    rounded = may_round() and is_precise_enough(inputs.dtype, matrix.bits)
    kept = torch.is_autocast_enabled(x.device.type)
    dtype = inputs.dtype if kept else product_dtype(inputs, may_round=rounded)
    return linear(inputs.to(dtype), _kept_dense(matrix, dtype, cache)).to(inputs.dtype)


def _kept_dense(matrix: PackedTensors, dtype: torch.dtype, cache: DerivedCache) -> Float[Tensor, "out columns"]:
    """The decoded matrix: the kept one, or one to be kept if there is room."""
    key = Path.DECODED, dtype
    rows, columns = matrix.shape
    if not cache.has_room(key, matrix.sources, rows * columns * dtype.itemsize):
        return matrix.dense(dtype)
    return cache.get(key, matrix.sources, lambda: counted(matrix.dense(dtype)))
