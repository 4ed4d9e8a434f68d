"""Products with packed matrices by torch's int4 kernel for CPUs, which is for few tokens.

The kernel knows 4-bit codes in groups of 32, 64, 128 or 256, with two bfloat16 numbers a group. Codes of 1 to 3 bits
are 4-bit codes as they are. Codes of 5 to 8 bits are a high and a low half, two 4-bit matrices side by side that are
multiplied by the inputs twice, at the bytes of 8 bits. Larger groups are cut into ones that it knows.

Codes are exact. Scales, inputs and outputs are rounded to bfloat16 (sums are float32): an error of the size that any
product in bfloat16 has, 0.3 % of the output. Up to 6 bits that is at most an eighth of what rounding normal weights to
their codes costs (a thirtieth for 4 bits in groups of 128), so modules in float32 and float16 take the kernel too, and,
for many tokens, a product in bfloat16 where that is the fast one. For 7 and 8 bits it is a quarter and a half; these do
so if ``torch.set_float32_matmul_precision`` is not at "highest".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

from ffsplit.kernels import cpu

GROUPS = (256, 128, 64, 32)
ROWS = 16
"""Rows are filled up to a multiple of this."""
HALF = 4
SURE_BITS = 6
"""Up to these the codes' own rounding is so large that the kernel's does not matter."""
MOST_TOKENS = {1: 24, 2: 4}
"""By halves a code: about where multiplying by the decoded matrix overtakes the kernel, which takes tokens in fours."""
MOST_BESIDE_BFLOAT16 = {1: 8, 2: 4}
"""The same where products in bfloat16 are fast."""
AVAILABLE = hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu") and cpu.VECTORS in ("AVX2", "AVX512")
"""Elsewhere torch runs the kernel without vector instructions."""


@dataclass(frozen=True)
class Int4Parts:
    """A packed matrix in the kernel's terms, not yet in its layout.

    Attributes:
        codes: ``[rows, halves * columns]``, 0 to 15, uint8: the high halves, then the low ones.
        table: ``[rows, groups, 2]``, float32: a weight (or half of it) is ``(code - 8) * scale + offset``.
        group: codes of a row that share these.
        halves: 1, or 2 for codes above 4 bits.
    """

    codes: Tensor
    table: Tensor
    group: int
    halves: int


@dataclass(frozen=True)
class Int4Matrix:
    """A packed matrix in the kernel's layout: half a byte a weight, a whole one above 4 bits, and 4 bytes a group.

    Attributes:
        weight: codes as torch orders them.
        scale_and_zero: the table, ``[groups, rows, 2]``, bfloat16.
        group: codes of a row that share these.
        rows: without those that fill up.
        halves: how many times the inputs stand beside each other.
    """

    weight: Tensor
    scale_and_zero: Tensor
    group: int
    rows: int
    halves: int


def halves(bits: int) -> int:
    """How many 4-bit codes a code takes."""
    return 1 if bits <= HALF else 2


def is_precise_enough(dtype: torch.dtype, bits: int) -> bool:
    """Whether bfloat16 between may stand for a product in this dtype."""
    return dtype == torch.bfloat16 or bits <= SURE_BITS or cpu.float32_precision() != "highest"


def most_tokens(bits: int) -> int:
    """Up to how many tokens the kernel is the faster way."""
    limits = MOST_TOKENS if cpu.SLOW_BFLOAT16 else MOST_BESIDE_BFLOAT16
    return limits[halves(bits)]


def fits(shape: tuple[int, int], group: int) -> bool:
    """Whether the kernel can be given such a matrix, and is fast here."""
    return AVAILABLE and shape[0] > 0 and kernel_group(shape[1], group) is not None


def kernel_group(columns: int, group: int) -> int | None:
    """The widest groups the kernel takes that cut the stored ones, and all columns, into whole pieces."""
    whole = columns if group >= columns else group
    return next((size for size in GROUPS if whole % size == 0 and columns % size == 0), None)


def int4_parts(
    codes: UInt8[Tensor, "out columns"],
    scale: Float[Tensor, "out groups"],
    zero: Float[Tensor, "out groups"],
    *,
    bits: int,
    group: int,
) -> Int4Parts:
    """Put a matrix ``scale * (code - zero)`` in the kernel's terms.

    Args:
        codes: unpacked.
        scale: float32.
        zero: float32.
        bits: of a code.
        group: columns that share a scale.
    """
    size = kernel_group(codes.shape[1], group)
    assert size is not None
    pieces = torch.arange(0, codes.shape[1], size, device=codes.device) // group
    step = scale[:, pieces].bfloat16().float()
    # The kernel subtracts 8 from every code. Codes are moved to the middle of its range first, or large terms would
    # cancel; what is then missing to `code - zero` is the offset.
    moved = 2 ** (HALF * halves(bits) - 1) - 2 ** (bits - 1)
    codes = codes + moved
    offset = step * (2 ** (HALF - 1) - moved - zero[:, pieces])
    if halves(bits) == 1:
        return Int4Parts(codes, torch.stack([step, offset], -1), size, 1)
    # In two parts, of which the second makes up for the rounding of the first.
    offset = offset + step * 2 ** (2 * HALF - 1)
    first = offset.bfloat16().float()
    steps, offsets = torch.cat([step * 2**HALF, step], 1), torch.cat([first, offset - first], 1)
    return Int4Parts(torch.cat([codes >> HALF, codes & 15], 1), torch.stack([steps, offsets], -1), size, 2)


def joined(parts: Sequence[Int4Parts], dim: int) -> Int4Parts:
    """Matrices below (0) or beside (1) each other as one; beside each other, every half is given inputs of its own."""
    size = min(part.group for part in parts)
    tables = [part.table.repeat_interleave(part.group // size, 1) for part in parts]
    codes = torch.cat([part.codes for part in parts], dim)
    return Int4Parts(codes, torch.cat(tables, dim), size, 1 if dim else parts[0].halves)


def int4_matrix(parts: Int4Parts) -> Int4Matrix:
    """Bring a matrix into the kernel's layout."""
    rows = parts.codes.shape[0]
    filler = -rows % ROWS
    return Int4Matrix(
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(pad(parts.codes, (0, 0, 0, filler)).int(), 1),
        pad(parts.table.transpose(0, 1), (0, 0, 0, filler)).bfloat16().contiguous(),
        parts.group,
        rows,
        parts.halves,
    )


def int4_linear(x: Float[Tensor, "*tokens columns"], matrix: Int4Matrix) -> Float[Tensor, "*tokens out"]:
    """``x W^T`` in the dtype of ``x``, computed from bfloat16 inputs to bfloat16 outputs, float32 between them."""
    # No call that would change nothing: at one token of a small matrix each of them shows.
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if flat.dtype != torch.bfloat16:
        flat = flat.bfloat16()
    if matrix.halves == 2:
        flat = torch.cat([flat, flat], 1)
    found: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        flat if flat.is_contiguous() else flat.contiguous(), matrix.weight, matrix.group, matrix.scale_and_zero
    )
    if found.shape[1] != matrix.rows:
        found = found[:, : matrix.rows]
    if found.dtype != x.dtype:
        found = found.to(x.dtype)
    return found if x.ndim == 2 else found.reshape(*x.shape[:-1], matrix.rows)
