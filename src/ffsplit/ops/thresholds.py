"""From what an activation is worth to thresholds on activations, and how sparsity is shared between matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

ROUNDING = 1e-9


def neuron_thresholds(level: float, weight: Float[Tensor, " neurons"]) -> Float[Tensor, " neurons"]:
    """``t_j`` such that ``|a_j| <= t_j`` exactly where ``|a_j| weight_j <= level``.

    Args:
        level: of the weighted activations, >= 0.
        weight: of every neuron, >= 0; one of zero contributes nothing and gets an infinite threshold.

    Returns:
        Thresholds, float64.

    Reference: CHESS, arXiv 2409.01366: ``t_j = sqrt(T / E[u_j^2])``, with ``level = sqrt(T)``.
    """
    wide = weight.double()
    return torch.where(wide > 0, level / torch.where(wide > 0, wide, 1.0), torch.inf)


def greedy_shares(
    error: Callable[[Sequence[float]], float], sizes: Sequence[int], target: float, step: float
) -> list[float]:
    """How sparse each matrix should be for a given average, by always sparing where it adds the least error.

    Args:
        error: of the block's output when each matrix has the given sparsity.
        sizes: parameters of each matrix.
        target: average sparsity over all parameters, 0 to 1.
        step: rise of the average in one decision, above 0; made a little smaller so that the steps are equal.

    Returns:
        Sparsities, whose average weighted by ``sizes`` is ``target`` up to rounding.

    Reference: TEAL, arXiv 2408.14690, block-wise greedy optimisation: in every step each matrix is tried
        with a rise in inverse proportion to its parameters.
    """
    total, shares = sum(sizes), [0.0] * len(sizes)
    step = target / max(math.ceil(target / step - ROUNDING), 1)
    left = target
    while left > ROUNDING:
        trials = []
        for index, size in enumerate(sizes):
            rise = min(min(step, left) * total / size, 1 - shares[index])
            if rise > ROUNDING:
                trial = [*shares[:index], shares[index] + rise, *shares[index + 1 :]]
                trials.append((error(trial), trial))
        shares = min(trials)[1]
        left = target - sum(size * share for size, share in zip(sizes, shares, strict=True)) / total
    return shares
