"""What a bias can make up for when neurons are pruned."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def pruned_mean(
    mean: Float[Tensor, " d_ff"], down: Float[Tensor, "d_model d_ff"], pruned: Int[Tensor, " pruned"]
) -> Float[Tensor, " d_model"]:
    """``sum over pruned j of mean(h_j) down_j``: the constant that best stands for what the pruned neurons added.

    Args:
        mean: of each hidden activation over the calibration tokens.
        down: the weight whose output is to be kept.
        pruned: indices of the neurons that go.

    Returns:
        What to add to the output bias, float64.

    Reference: FLAP, arXiv 2312.11983, the baseline bias compensation.
    """
    return down.index_select(1, pruned).double() @ mean.index_select(0, pruned).double()
