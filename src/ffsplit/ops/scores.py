"""Importance of single neurons: one float64 number each, larger = more important.

Neuron ``j`` is row ``j`` of ``up`` (and ``gate``) and column ``j`` of ``down``; ``h_j`` is its activation over the
calibration tokens. All scores are separable, so permuting the neurons permutes the scores.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def column_norm(down: Float[Tensor, "d_model d_ff"]) -> Float[Tensor, " d_ff"]:
    """``||down_j||``, the length of each neuron's output direction."""
    return down.double().square().sum(0).sqrt()


def activation_norm(square_sum: Float[Tensor, " d_ff"]) -> Float[Tensor, " d_ff"]:
    """``||h_j||`` from ``square_sum = sum over tokens of h_j^2``.

    Reference: FFSplit, arXiv 2401.04044, eq. 3.
    """
    return square_sum.double().clamp_min(0.0).sqrt()


def output_norm(square_sum: Float[Tensor, " d_ff"], down: Float[Tensor, "d_model d_ff"]) -> Float[Tensor, " d_ff"]:
    """``||h_j down_j^T||_F = ||h_j|| ||down_j||``: the error of removing neuron j alone.

    Reference: FFSplit, arXiv 2401.04044, eq. 3 and 4.
    """
    return activation_norm(square_sum) * column_norm(down)


def magnitude(
    up: Float[Tensor, "d_ff d_model"],
    gate: Float[Tensor, "d_ff d_model"] | None,
    down: Float[Tensor, "d_model d_ff"],
) -> Float[Tensor, " d_ff"]:
    """``||up_j|| ||gate_j|| ||down_j||``, no data needed; unchanged by moving scale between ``up`` and ``down``."""
    score = up.double().square().sum(1).sqrt() * column_norm(down)
    return score if gate is None else score * gate.double().square().sum(1).sqrt()


def wanda_sp(square_sum: Float[Tensor, " d_ff"], down: Float[Tensor, "d_model d_ff"]) -> Float[Tensor, " d_ff"]:
    """``sum_i |down_ij| ||h_j||``: Wanda's weight metric summed over the structure.

    Reference: Wanda, arXiv 2306.11695, eq. 1; the structured form is the Wanda-sp baseline of FLAP, arXiv 2312.11983.
    """
    return down.double().abs().sum(0) * activation_norm(square_sum)


def flap_variance(variance: Float[Tensor, " d_ff"], down: Float[Tensor, "d_model d_ff"]) -> Float[Tensor, " d_ff"]:
    """``var(h_j) ||down_j||^2`` (WIFV): what is lost once the mean of a removed neuron lives on in a bias.

    Reference: FLAP, arXiv 2312.11983, the weighted input feature variance.
    """
    return variance.double().clamp_min(0.0) * column_norm(down).square()


def minitron(sequence_mean_square: Float[Tensor, " d_ff"]) -> Float[Tensor, " d_ff"]:
    """``sqrt(sum over sequences of (mean over the sequence of |h_j|)^2)``, given that sum.

    Reference: Minitron, arXiv 2407.14679, mean over the sequence and l2 norm over the batch.
    """
    return sequence_mean_square.double().clamp_min(0.0).sqrt()


def random_scores(d_ff: int, generator: torch.Generator) -> Float[Tensor, " d_ff"]:
    """Uniform noise on the generator's device: the control that every score must beat."""
    return torch.rand(d_ff, generator=generator, dtype=torch.float64, device=generator.device)
