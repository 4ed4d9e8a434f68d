"""Which weights of a matrix survive: scores of single weights, and masks that keep the best in some pattern.

A score has the shape of the matrix ``[out, in]``; larger = more important. A mask is True where the weight survives.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from ffsplit.errors import RecipeError


def wanda(weight: Float[Tensor, "out in"], square_sum: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """``|W_ij| ||x_j||``, the size of what weight (i, j) adds to output i over the calibration tokens.

    Args:
        weight: the matrix.
        square_sum: sum over tokens of ``x_j^2``, the diagonal of the inputs' Gram.

    Reference: Wanda, arXiv 2306.11695, eq. 1.
    """
    return weight.double().abs() * square_sum.double().clamp_min(0.0).sqrt()


def dass(
    weight: Float[Tensor, "out in"],
    square_sum: Float[Tensor, " in"],
    output_norm: Float[Tensor, " out"],
    alpha: float,
) -> Float[Tensor, "out in"]:
    """``|W_ij| ||x_j|| ||h_i||^alpha``: a weight of `up` or `gate` counts more in a neuron that is active more.

    The factor is the same for all weights of an output, so it matters only where weights of different outputs are
    compared with each other.

    Args:
        weight: the matrix.
        square_sum: sum over tokens of ``x_j^2``.
        output_norm: ``||h_i||`` of the neuron that each output belongs to.
        alpha: 0 is `wanda`.

    Reference: DaSS, arXiv 2405.01943, the metric for the input projections of a GLU.
    """
    return wanda(weight, square_sum) * output_norm.double().pow(alpha)[:, None]


def rows_mask(score: Float[Tensor, "out in"], kept: int) -> Bool[Tensor, "out in"]:
    """The best weights of every row, ``kept`` in all.

    Every row keeps equally many; where that does not divide, the rows with the best next weight keep one more.

    Raises:
        RecipeError: ``kept`` is negative or more than there are.
    """
    rows, columns = score.shape
    if not 0 <= kept <= rows * columns:
        raise RecipeError(f"kept={kept} is not in 0..{rows * columns}, the weights of the matrix")
    each, extra = divmod(kept, max(rows, 1))
    order = score.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    mask.scatter_(1, order[:, :each], True)
    if extra:
        following = order[:, each]
        best = score.gather(1, following[:, None])[:, 0].topk(extra).indices
        mask[best, following[best]] = True
    return mask


def best_mask(score: Float[Tensor, "out in"], kept: int) -> Bool[Tensor, "out in"]:
    """The ``kept`` best weights, wherever they stand."""
    return rows_mask(score.reshape(1, -1), kept).view_as(score)


def n_m_mask(score: Float[Tensor, "out in"], n: int, m: int) -> Bool[Tensor, "out in"]:
    """The best ``n`` of every ``m`` neighbours along the inputs; of a last short group, its best ``n`` or all.

    Raises:
        RecipeError: ``n`` is not in 1..m.
    """
    if not 1 <= n <= m:
        raise RecipeError(f"n={n} is not in 1..{m}, the size of a group")
    rows, columns = score.shape
    # Places beyond the matrix come last, even after weights that are worth nothing.
    groups = pad(score, (0, -columns % m), value=-torch.inf).view(rows, -1, m)
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=score.device).scatter_(-1, best, True)
    return mask.view(rows, -1)[:, :columns].contiguous()
