"""Adding the second moment of a chunk of rows to a running sum, without doing its symmetric half twice."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

WIDE = 512
"""Columns from which the product is cut into strips; below, one product is quicker."""
STRIPS = 4


def add_gram(total: Float[Tensor, "columns columns"], x: Float[Tensor, "rows columns"]) -> None:
    """``total += x^T x`` in the dtype of ``total``, in place.

    A wide product is cut into strips of columns, of which only the upper triangle is multiplied: 10 of 16 pieces.
    """
    wide = x.to(total.dtype)
    columns = wide.shape[1]
    if columns < WIDE:
        total.addmm_(wide.T, wide)
        return
    edges = torch.linspace(0, columns, STRIPS + 1).long().tolist()
    strips = [slice(start, stop) for start, stop in pairwise(edges)]
    for index, first in enumerate(strips):
        for second in strips[index:]:
            piece = wide[:, first].T @ wide[:, second]
            total[first, second] += piece
            if first != second:
                total[second, first] += piece.T
