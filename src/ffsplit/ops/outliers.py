"""Input columns that are too sensitive to be rounded, and how they make up for the rounding of the others (OWQ)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ffsplit.ops.linalg import solve_psd


def weak_columns(
    weight: Float[Tensor, "out in"],
    rounded: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"] | None,
    count: int,
) -> Int[Tensor, " count"]:
    """The columns whose rounding costs most, ascending.

    Args:
        weight: the weight.
        rounded: a first rounding of it.
        gram: ``sum x^T x`` of the inputs; None counts every input alike.
        count: how many columns.

    Reference: OWQ, arXiv 2306.02272, sensitivity ``diag(H)_j ||W_q,j - W_j||^2``.
    """
    damage = (weight.double() - rounded.double()).square().sum(0)
    if gram is not None:
        damage = damage * gram.diagonal().double().clamp_min(0.0)
    return damage.argsort(descending=True, stable=True)[:count].sort().values


def other_columns(index: Int[Tensor, " count"], columns: int) -> Int[Tensor, " others"]:
    """The columns that are not in ``index``, ascending; sizes depend on shapes alone, so that it compiles."""
    marked = torch.zeros(columns, dtype=torch.uint8, device=index.device).index_fill(0, index.long(), 1)
    return marked.argsort(stable=True)[: columns - index.shape[0]]


def remaining_gram(
    gram: Float[Tensor, "in in"], index: Int[Tensor, " count"], others: Int[Tensor, " others"], ridge: float
) -> Float[Tensor, "others others"]:
    """The Gram of what the outlier columns cannot make up for: the Schur complement, float64."""
    wide = gram.double()
    shared = wide[index][:, others]
    left = wide[others][:, others] - shared.T @ solve_psd(wide[index][:, index], shared, ridge)
    return (left + left.T) / 2


def absorbing_columns(
    weight: Float[Tensor, "out in"],
    rounded: Float[Tensor, "out others"],
    gram: Float[Tensor, "in in"],
    index: Int[Tensor, " count"],
    others: Int[Tensor, " others"],
    ridge: float,
) -> Float[Tensor, "out count"]:
    """The outlier columns by least squares, given the rounded others, pulled to the old ones by the ridge; float64."""
    wide, error = gram.double(), weight.double()[:, others] - rounded.double()
    shared = wide[index][:, others]
    return weight.double()[:, index] + solve_psd(wide[index][:, index], shared @ error.T, ridge).T
