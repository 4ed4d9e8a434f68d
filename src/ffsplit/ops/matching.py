"""Which neuron of one layer is which of another: similarities, and the best one-to-one assignment."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def best_assignment(similarity: Float[Tensor, "n n"]) -> Int[Tensor, " n"]:
    """The permutation ``p`` that maximises ``sum_i similarity[i, p(i)]``, by the Hungarian algorithm on the CPU.

    Args:
        similarity: finite; row ``i`` is a neuron of the owner, column ``j`` one of the other layer.

    Reference: Kuhn, The Hungarian method for the assignment problem, 1955.
    """
    _, columns = linear_sum_assignment(similarity.detach().double().cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(device=similarity.device, dtype=torch.int64)


def correlation(
    cross: Float[Tensor, "n m"],
    first: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
    second: tuple[Float[Tensor, " m"], Float[Tensor, " m"]],
    count: float,
) -> Float[Tensor, "n m"]:
    """Pearson correlations of two sets of activations from sums over the same tokens; 0 for a constant one.

    Args:
        cross: ``sum h^T g``.
        first: ``sum h`` and ``sum h^2``.
        second: ``sum g`` and ``sum g^2``.
        count: tokens in the sums, >= 1.
    """
    (h_sum, h_square), (g_sum, g_square) = first, second
    covariance = cross.double() - torch.outer(h_sum.double(), g_sum.double()) / count
    scale = torch.outer(_inverse_deviation(h_sum, h_square, count), _inverse_deviation(g_sum, g_square, count))
    return (covariance * scale).clamp(-1.0, 1.0)


def _inverse_deviation(total: Float[Tensor, " n"], square: Float[Tensor, " n"], count: float) -> Float[Tensor, " n"]:
    """``1 / sqrt(sum (h - mean)^2)``; 0 where rounding is all that there is."""
    energy = square.double()
    variance = energy - total.double().square() / count
    varies = variance > 1e-12 * energy
    return torch.where(varies, torch.where(varies, variance, 1.0).rsqrt(), 0.0)


def unexplained_energy(
    mine: Float[Tensor, " n"], theirs: Float[Tensor, " n"], cross: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """``min_c ||g - c h||^2`` of pairs of activations from ``sum g^2``, ``sum h^2`` and ``sum g h``, >= 0."""
    explained = torch.where(theirs > 0, cross.square() / torch.where(theirs > 0, theirs, 1.0), 0.0)
    return (mine - explained).clamp_min(0.0)


def token_gram(hidden: Float[Tensor, "tokens n"]) -> Float[Tensor, "tokens tokens"]:
    """The Gram of the tokens in a layer's centred activations, of unit Frobenius norm (zero for a constant layer)."""
    centred = hidden.double() - hidden.double().mean(dim=0)
    gram = centred @ centred.T
    norm = gram.norm()
    return gram / torch.where(norm > 0, norm, 1.0)


def linear_cka(first: Float[Tensor, "tokens tokens"], second: Float[Tensor, "tokens tokens"]) -> float:
    """Linear centred kernel alignment of two layers, 0 to 1, from their :func:`token_gram`.

    Unlike a correlation of neurons it needs no matching: rotating either layer's activations changes nothing.

    Reference: Kornblith et al., Similarity of Neural Network Representations Revisited, arXiv 1905.00414, eq. 4.
    """
    return float((first * second).sum())
