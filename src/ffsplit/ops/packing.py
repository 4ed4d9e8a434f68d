"""Codes of 1 to 8 bits, stored densely in bytes.

A code of b bits is cut into fields of 4, 2 and 1 bits, the widest holding the lowest bits (3 = 2 + 1, 5 = 4 + 1,
6 = 4 + 2, 7 = 4 + 2 + 1; 8 is a byte as it is). Each field has its own plane, in which neighbouring columns share a
byte, the first in the lowest bits; the planes stand side by side in the last dimension. Columns are padded to a
multiple of 8, so that every plane ends on a byte. Shifts and masks on uint8 only: they compile and they fuse.
"""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import pad

from ffsplit.errors import RecipeError

PAD = 8


def field_widths(bits: int) -> tuple[int, ...]:
    """Widths of the fields a code is cut into, lowest bits first: 7 -> (4, 2, 1).

    Raises:
        RecipeError: ``bits`` is not in 1..8.
    """
    if not 1 <= bits <= 8:
        raise RecipeError(f"bits={bits} is not in 1..8")
    return (8,) if bits == 8 else tuple(width for width in (4, 2, 1) if bits & width)


def packed_columns(columns: int, bits: int) -> int:
    """Bytes per row that `pack` writes for ``columns`` codes of ``bits`` bits."""
    return -(-columns // PAD) * PAD // 8 * sum(field_widths(bits))


def pack(codes: UInt8[Tensor, "*rows columns"], bits: int) -> UInt8[Tensor, "*rows packed"]:
    """Store codes below ``2**bits`` in ``packed_columns(columns, bits)`` bytes per row.

    Higher bits of a code, if any, are dropped.
    """
    padded = pad(codes, (0, -codes.shape[-1] % PAD))
    planes, shift = [], 0
    for width in field_widths(bits):
        planes.append(_pack_field((padded >> shift) & (2**width - 1), width))
        shift += width
    return torch.cat(planes, dim=-1)


def unpack(packed: UInt8[Tensor, "*rows packed"], bits: int, columns: int) -> UInt8[Tensor, "*rows columns"]:
    """The inverse of `pack`: the first ``columns`` codes of every row."""
    padded = -(-columns // PAD) * PAD
    widths = field_widths(bits)
    planes = torch.split(packed, [padded * width // 8 for width in widths], dim=-1)
    codes, shift = _unpack_field(planes[0], widths[0]), widths[0]
    for plane, width in zip(planes[1:], widths[1:], strict=True):
        codes = codes | (_unpack_field(plane, width) << shift)
        shift += width
    return codes[..., :columns]


def _pack_field(field: UInt8[Tensor, "*rows padded"], width: int) -> UInt8[Tensor, "*rows bytes"]:
    """Put ``8 // width`` neighbouring fields into each byte."""
    lanes = field.reshape(*field.shape[:-1], field.shape[-1] * width // 8, 8 // width).unbind(-1)
    packed = lanes[0]
    for index, lane in enumerate(lanes[1:], start=1):
        packed = packed | (lane << (index * width))
    return packed


def _unpack_field(plane: UInt8[Tensor, "*rows bytes"], width: int) -> UInt8[Tensor, "*rows padded"]:
    """Take the ``8 // width`` neighbouring fields out of each byte."""
    if width == 8:
        return plane
    lanes = [(plane >> shift) & (2**width - 1) for shift in range(0, 8, width)]
    return torch.stack(lanes, dim=-1).flatten(-2)
