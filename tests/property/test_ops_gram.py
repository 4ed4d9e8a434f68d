from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffsplit.ops.gram import WIDE, add_gram


@given(rows=st.integers(0, 9), columns=st.sampled_from([1, 7, WIDE - 1, WIDE, WIDE + 3]), chunks=st.integers(1, 3))
def test_the_sum_is_the_whole_gram(rows: int, columns: int, chunks: int) -> None:
    x = torch.randn(rows * chunks, columns, generator=torch.Generator().manual_seed(rows + columns))
    total = torch.zeros(columns, columns, dtype=torch.float64)
    for chunk in x.chunk(chunks) if rows else [x]:
        add_gram(total, chunk)
    torch.testing.assert_close(total, x.double().T @ x.double())
    torch.testing.assert_close(total, total.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_are_taken_in_the_dtype_of_the_sum(dtype: torch.dtype) -> None:
    x = torch.full((4096, 2), 1.001, dtype=dtype)
    total = torch.zeros(2, 2, dtype=torch.float64)
    add_gram(total, x)
    torch.testing.assert_close(total, torch.full_like(total, 4096 * float(x[0, 0].double()) ** 2), rtol=1e-12, atol=0)
