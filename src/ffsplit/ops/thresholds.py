"""From what an activation is worth to thresholds on activations, and how sparsity is shared between matrices."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


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
