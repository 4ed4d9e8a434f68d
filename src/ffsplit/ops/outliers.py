"""What is too sensitive to be rounded: input columns, which make up for the rounding of the others, and single weights.

OWQ keeps columns, SpQR single weights.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from ffsplit.ops.gptq import inverse_factor
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
    return _costliest(damage, count)


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


def weak_weights(
    weight: Float[Tensor, "out in"],
    rounded: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"] | None,
    count: int,
    ridge: float,
) -> Int[Tensor, " count"]:
    """The single weights whose rounding costs most even when all others of their row adapt, ascending places.

    Args:
        weight: the weight.
        rounded: a first rounding of it.
        gram: ``sum x^T x`` of the inputs; None counts every input alike.
        count: how many weights.
        ridge: on the Gram, relative to its mean diagonal.

    Returns:
        places in the matrix, row by row.

    Reference: SpQR, arXiv 2306.03078, sensitivity ``(w_ij - q_ij)^2 / [H^-1]_jj``.
    """
    damage = (weight.double() - rounded.double()).square()
    if gram is not None:
        damage = damage / inverse_factor(gram.double(), ridge).square().sum(0)
    return _costliest(damage.flatten(), count)


def _costliest(damage: Float[Tensor, " places"], count: int) -> Int[Tensor, " count"]:
    """The places of the largest damages, ascending; of equal ones the first."""
    return damage.argsort(descending=True, stable=True)[:count].sort().values


def extremes(weight: Float[Tensor, "out in"], group: int, each: int = 2) -> Int[Tensor, " count"]:
    """Places, row by row, of the weights that are farthest from the mean of their group of columns.

    Args:
        weight: the weight.
        group: consecutive columns of a row.
        each: places of a group; fewer where it has no more columns than that.
    """
    rows, columns = weight.shape
    cells = pad(weight, (0, -columns % group), value=float("nan")).view(rows, -1, group)
    far = (cells - cells.nanmean(-1, keepdim=True)).abs().nan_to_num(nan=-1.0)
    inside = far.topk(min(each, max(group - 1, 1)), dim=-1).indices
    column = inside + group * torch.arange(cells.shape[1], device=weight.device)[:, None]
    places = column + columns * torch.arange(rows, device=weight.device)[:, None, None]
    return places[column < columns].sort().values


def excess_of(weight: Float[Tensor, "out in"], places: Int[Tensor, " count"], group: int) -> Float[Tensor, " count"]:
    """How far some weights lie outside the range of the others of their group of columns; ``weight`` less this is tame.

    Args:
        weight: the weight.
        places: in the matrix, row by row.
        group: consecutive columns of a row; where all of a group are named, they are outside of zero.
    """
    rows, columns = weight.shape
    named = torch.zeros(rows * columns, dtype=torch.bool, device=weight.device)
    named[places] = True
    short = -columns % group
    cells = pad(weight, (0, short)).view(rows, -1, group)
    out = pad(named.view(rows, columns), (0, short), value=True).view(rows, -1, group)
    low = cells.masked_fill(out, float("inf")).amin(-1, keepdim=True)
    high = cells.masked_fill(out, float("-inf")).amax(-1, keepdim=True)
    empty = low > high
    tame = cells.clamp(low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0))
    return (cells - tame).reshape(rows, -1)[:, :columns].flatten()[places]
