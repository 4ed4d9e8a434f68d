"""Packed codes in the layout of ONNX Runtime's MatMulNBits: the same weights to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

from ffsplit.ffn.projections import Packed, PackedSpec
from ffsplit.kernels.packed import decoded_scale
from ffsplit.ops.packing import pack, unpack

BLOCKS = (256, 128, 64, 32, 16)
"""Block sizes, the fastest first."""
WIDTHS = (2, 4, 8)
"""Bits of a code in the graph; others are stored in the next wider ones, which leaves their values alone."""
SMALLEST_PAIRS = 32
"""Blocks below this have a fast kernel for 4 and 8 bits, but none for 2."""


@dataclass(frozen=True)
class BlockCodes:
    """A matrix ``[out, columns]`` as ``scale * (code - zero)`` in blocks of columns.

    Attributes:
        codes: ``[out, blocks, block * bits / 8]``, the first column in the lowest bits; columns that fill the last
            block up have code 0 and meet no input.
        scale: of every row and block.
        zero: of every row and block, packed along the row; None means ``2 ** (bits - 1)``.
        bits: 2, 4 or 8.
        block: columns that share a scale.
        columns: of the matrix.
    """

    codes: UInt8[Tensor, "out blocks bytes"]
    scale: Float[Tensor, "out blocks"]
    zero: UInt8[Tensor, "out packed_zeros"] | None
    bits: int
    block: int
    columns: int

    @staticmethod
    def stacked(parts: Sequence[BlockCodes]) -> BlockCodes:
        """The rows of all parts, which have equal bits, blocks and columns."""
        first = parts[0]
        zeros = [part.zero for part in parts if part.zero is not None]
        return BlockCodes(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat(zeros) if zeros else None,
            first.bits,
            first.block,
            first.columns,
        )


def block_size(spec: PackedSpec) -> int | None:
    """Columns of a block such that every block lies in one group; None if ONNX Runtime has no such size."""
    if spec.groups == 1:
        return BLOCKS[0]
    return next((block for block in BLOCKS if spec.group % block == 0), None)


def block_codes(packed: Packed) -> BlockCodes:
    """The codes, scales and zeros of a packed matrix; its ``input_scale`` is left to the caller.

    Raises:
        ValueError: no block size fits the groups, see :func:`block_size`.
    """
    spec = packed.spec
    block = block_size(spec)
    if block is None:
        raise ValueError(f"groups of {spec.group} columns are no multiple of {BLOCKS[-1]}")
    rows, columns = spec.shape
    widths = WIDTHS if block >= SMALLEST_PAIRS else WIDTHS[1:]
    bits = next(width for width in widths if width >= spec.bits)
    blocks = -(-columns // block)
    codes = unpack(packed.codes, spec.bits, columns)
    if spec.symmetric:
        codes = codes + (2 ** (bits - 1) - 2 ** (spec.bits - 1))  # to where a grid without zeros has its middle
    group_of = torch.arange(blocks) * block // spec.group if spec.groups > 1 else torch.zeros(blocks, dtype=torch.long)
    filled = pad(codes, (0, blocks * block - columns)).view(rows, blocks, block)
    scale = decoded_scale(packed.scale, packed.row_scale).float()[:, group_of].contiguous()
    return BlockCodes(pack(filled, bits), scale, _zeros(packed, group_of, bits), bits, block, columns)


def _zeros(packed: Packed, group_of: Tensor, bits: int) -> UInt8[Tensor, "out packed_zeros"] | None:
    if packed.zero is None:
        return None
    rows, groups = packed.scale.shape
    zero = unpack(packed.zero, packed.spec.bits, rows * groups).view(rows, groups)[:, group_of]
    return pack(zero, bits)[:, : -(-len(group_of) * bits // 8)].contiguous()
