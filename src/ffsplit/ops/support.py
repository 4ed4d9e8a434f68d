"""The best values of a sparse matrix whose places are given."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ffsplit.ops.linalg import ridged, shifted_cholesky

SMALLEST_RIDGE = 1e-8  # a dead input must leave its weights as they are, not undefined
ELEMENTS = 2**25
"""Of the submatrices that are solved with at once, 256 MB."""


def refit_support(
    weight: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"], gram: Float[Tensor, "in in"], ridge: float
) -> Float[Tensor, "out in"]:
    """``argmin_V tr((V - W) (G + lam I) (V - W)^T)`` over the matrices that are zero outside ``mask``.

    Rows are independent, ``V_S = W_S + (G_SS + lam I)^-1 (G (W - W_S))_S``; those with about equally many survivors are
    solved as one batch. Never worse, in that norm, than dropping the other weights. Costs a Cholesky factorization of
    the size of its support for every row.

    Args:
        weight: what to imitate.
        mask: True where a weight may stand.
        gram: ``sum x^T x`` of the inputs; dead inputs and singular Grams are fine.
        ridge: ``lam`` relative to the mean diagonal of ``gram``.

    Returns:
        The matrix, float64.
    """
    dense = weight.double()
    dropped = dense.masked_fill(mask, 0.0)
    wanted = dropped @ ridged(gram, 0.0)
    factor = shifted_cholesky(ridged(gram, max(ridge, SMALLEST_RIDGE)))
    metric = factor @ factor.T  # with every submatrix positive definite, by interlacing
    result = dense - dropped
    counts = mask.sum(1)
    order = counts.argsort(descending=True)
    start = 0
    while start < len(order) and (size := int(counts[order[start]])):
        rows = order[start : start + max(ELEMENTS // size**2, 1)]
        result[rows] += _solved(wanted[rows], mask[rows], metric, size)
        start += len(rows)
    return result


def _solved(
    wanted: Float[Tensor, "rows in"], mask: Bool[Tensor, "rows in"], metric: Float[Tensor, "in in"], size: int
) -> Float[Tensor, "rows in"]:
    """``(metric_SS)^-1 wanted_S`` of every row, zero outside its support of at most ``size``."""
    support: Int[Tensor, "rows size"] = (~mask).to(torch.uint8).sort(dim=1, stable=True).indices[:, :size]
    real = mask.gather(1, support)
    matrices = metric[support[:, :, None], support[:, None, :]]
    # A row with fewer survivors is filled up with equations that say zero.
    identity = torch.eye(size, dtype=metric.dtype, device=metric.device)
    matrices = torch.where(real[:, :, None] & real[:, None, :], matrices, identity)
    right = wanted.gather(1, support) * real
    solution = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(matrices))[:, :, 0]
    return torch.zeros_like(wanted).scatter(1, support, solution * real)
