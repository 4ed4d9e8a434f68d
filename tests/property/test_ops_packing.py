from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffsplit.errors import RecipeError
from ffsplit.ops.packing import field_widths, pack, packed_columns, unpack
from tests.property.amount import examples

properties = examples(100)


@properties
@given(bits=st.integers(1, 8), rows=st.integers(0, 5), columns=st.integers(0, 70), seed=st.integers(0, 2**20))
def test_round_trip(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_columns(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)


@properties
@given(bits=st.integers(1, 8), columns=st.integers(0, 500))
def test_size_is_the_padded_bit_count(bits: int, columns: int) -> None:
    assert packed_columns(columns, bits) == (columns + 7) // 8 * bits
    assert sum(field_widths(bits)) == bits


@pytest.mark.parametrize("bits", range(1, 9))
def test_leading_dimensions(bits: int) -> None:
    codes = torch.arange(2 * 3 * 11).reshape(2, 3, 11).remainder(2**bits).to(torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, 11), codes)
    assert torch.equal(packed[1, 2], pack(codes[1, 2], bits))


def test_layout_is_as_documented() -> None:
    codes = torch.tensor([[5, 2, 7, 0, 1, 3, 4, 6]], dtype=torch.uint8)
    low, high = codes & 3, codes >> 2
    two = [int(sum(int(low[0, 4 * b + i]) << (2 * i) for i in range(4))) for b in range(2)]
    one = int(sum(int(high[0, i]) << i for i in range(8)))
    assert pack(codes, 3).tolist() == [[*two, one]]


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_impossible_widths_are_refused(bits: int) -> None:
    with pytest.raises(RecipeError, match=f"bits={bits}"):
        pack(torch.zeros(1, 8, dtype=torch.uint8), bits)
