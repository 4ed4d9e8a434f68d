"""The forward of a matrix with unstructured zeros: put the survivors in their places, multiply densely."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ffsplit.ops.packing import unpack


def fill(
    values: Float[Tensor, " kept"], mask: UInt8[Tensor, " packed"], rows: int, columns: int, dtype: torch.dtype
) -> Float[Tensor, "rows columns"]:
    """The dense matrix; gradients flow to ``values``.

    Args:
        values: survivors, row by row.
        mask: one bit a weight, the whole matrix packed as one row; as many bits are set as there are values.
        rows: of the matrix.
        columns: of the matrix.
        dtype: of the result.
    """
    kept = unpack(mask, 1, rows * columns).bool().view(rows, columns)
    return values.new_zeros(rows, columns, dtype=dtype).masked_scatter(kept, values.to(dtype))
