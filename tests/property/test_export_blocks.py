"""Packed matrices as MatMulNBits blocks are the same matrices, decoded as ONNX Runtime's specification says."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor

from ffsplit.export.blocks import BlockCodes, block_codes
from ffsplit.ffn.projections import Packed
from ffsplit.ops.rounding import encode, fit_grid


def fields(stored: Tensor, bits: int) -> Tensor:
    """Codes of 2, 4 or 8 bits, the first in the lowest bits of a byte."""
    lanes = [(stored >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(lanes, dim=-1).flatten(-2).long()


def decoded(stored: BlockCodes) -> Float[Tensor, "rows columns"]:
    rows, blocks = stored.scale.shape
    codes = fields(stored.codes, stored.bits)
    assert codes.shape == (rows, blocks, stored.block)
    middle = torch.full((rows, blocks), 2 ** (stored.bits - 1))
    zero = middle if stored.zero is None else fields(stored.zero, stored.bits)[:, :blocks]
    weight = stored.scale[..., None] * (codes - zero[..., None])
    return weight.flatten(1)[:, : stored.columns]


@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 5),
    columns=st.integers(1, 300),
    group=st.sampled_from([16, 32, 48, 80, 128, 256, 1000]),
    symmetric=st.booleans(),
    scale_bits=st.sampled_from([8, 16]),
)
def test_blocks_hold_the_same_weights(
    bits: int, rows: int, columns: int, group: int, symmetric: bool, scale_bits: int
) -> None:
    if symmetric and bits == 1:
        return
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    grid = fit_grid(weight, bits, group, symmetric=symmetric, scale_bits=scale_bits)
    packed = Packed.from_codes(encode(weight, grid, bits), grid, bits=bits, group=group, symmetric=symmetric)
    torch.testing.assert_close(decoded(block_codes(packed)), packed.dense(), rtol=0, atol=0)
