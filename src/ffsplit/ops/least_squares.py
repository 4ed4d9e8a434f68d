"""Least squares from sums: what a linear map should be, given only second moments of its inputs and targets.

``gram = sum x^T x`` and ``cross = sum x^T y`` over the calibration tokens; weights in the torch layout ``[out, in]``.
Results are float64, the caller casts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ffsplit.errors import RecipeError
from ffsplit.ops.linalg import eigh_psd, ridged, solve_psd
from ffsplit.ops.lowrank import balanced_projection


def refit_down(
    gram: Float[Tensor, "k k"],
    cross: Float[Tensor, "k d_model"],
    ridge: float,
    prior: Float[Tensor, "d_model k"] | None = None,
) -> Float[Tensor, "d_model k"]:
    """``argmin_W ||h W^T - y||_F^2 + ridge * mean(diag(gram)) * ||W - prior||_F^2``.

    Args:
        gram: ``h^T h``; may be singular.
        cross: ``h^T y``.
        ridge: strength of the pull to ``prior``, relative to the mean diagonal, >= 0.
        prior: where the data do not decide, the solution stays here; zero if None.

    Returns:
        The weight, float64. Solved for the change from ``prior``, so directions without data leave it untouched.
    """
    if prior is None:
        return solve_psd(gram, cross, ridge).T
    start = prior.double()
    return start + solve_psd(gram, cross.double() - gram.double() @ start.T, ridge).T


def refit_from_gram(
    hidden_gram: Float[Tensor, "d_ff d_ff"],
    kept: Int[Tensor, " kept"],
    down: Float[Tensor, "d_model d_ff"],
    ridge: float,
    prior: Float[Tensor, "d_model kept"] | None = None,
) -> Float[Tensor, "d_model kept"]:
    """The ``down`` of the kept neurons that best reproduces the output of all neurons.

    ``(C_SS + lam I)^-1 C_S: down^T``, with the ridge pulling to ``prior`` (default: the old columns of the kept
    neurons), not to zero.

    Reference: MoDeGPT, arXiv 2408.09632, the Nystrom step; STAT, arXiv 2406.00061.
    """
    rows = hidden_gram.index_select(0, kept).double()
    cross = rows @ down.double().T
    old = down.index_select(1, kept) if prior is None else prior
    return refit_down(rows.index_select(1, kept), cross, ridge, old)


def affine_fit(
    gram: Float[Tensor, "k k"],
    cross: Float[Tensor, "k d_out"],
    x_sum: Float[Tensor, " k"],
    y_sum: Float[Tensor, " d_out"],
    count: int,
    ridge: float,
    prior: Float[Tensor, "d_out k"] | None = None,
) -> tuple[Float[Tensor, "d_out k"], Float[Tensor, " d_out"]]:
    """Weight and bias minimising ``||x W^T + b - y||_F^2`` plus the ridge of `refit_down` on the weight alone.

    Args:
        gram: ``sum x^T x``, not centred.
        cross: ``sum x^T y``, not centred.
        x_sum: ``sum x``.
        y_sum: ``sum y``.
        count: number of tokens in the sums, >= 1.
        ridge: relative to the mean diagonal of the centred Gram.
        prior: see `refit_down`.
    """
    if count < 1:
        raise RecipeError(f"count={count}: an affine fit needs the sums of at least one token")
    x_total, y_total = x_sum.double(), y_sum.double()
    weight = refit_down(*centred(gram, cross, x_total, y_total, count), ridge, prior)
    return weight, (y_total - weight @ x_total) / count


def centred(
    gram: Float[Tensor, "k k"],
    cross: Float[Tensor, "k d_out"],
    x_sum: Float[Tensor, " k"],
    y_sum: Float[Tensor, " d_out"],
    count: int,
) -> tuple[Float[Tensor, "k k"], Float[Tensor, "k d_out"]]:
    """``gram`` and ``cross`` of the deviations from the mean, float64."""
    x_total, y_total = x_sum.double(), y_sum.double()
    return gram.double() - torch.outer(x_total, x_total) / count, cross.double() - torch.outer(x_total, y_total) / count


def residual_energy(
    gram: Float[Tensor, "k k"],
    cross: Float[Tensor, "k d_out"],
    target_energy: Float[Tensor, ""] | float,
    weight: Float[Tensor, "d_out k"],
) -> Float[Tensor, ""]:
    """``||h W^T - y||_F^2`` from the sums, ``target_energy = ||y||_F^2``; float64, never negative."""
    dense = weight.double()
    energy = (dense @ gram.double() * dense).sum() - 2 * (dense.T * cross.double()).sum() + target_energy
    return energy.clamp_min(0.0)


def reduced_rank_regression(
    gram: Float[Tensor, "d_in d_in"], cross: Float[Tensor, "d_in d_out"], rank: int, ridge: float
) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
    """The best linear map of rank ``rank``: ``(a, b)`` minimising ``||x (a b)^T - y||_F^2 + lam ||a b||_F^2``.

    The full-rank solution is projected on the leading principal directions of its own predictions, in the norm of the
    (ridged) Gram.

    Returns:
        Balanced factors, float64, for ``y ~ a @ (b @ x)``.

    Raises:
        RecipeError: ``rank`` is negative or above ``min(d_in, d_out)``.

    Reference: Izenman, Reduced-rank regression for the multivariate linear model, 1975.
    """
    limit = min(cross.shape)
    if not 0 <= rank <= limit:
        raise RecipeError(f"rank={rank} is not in 0..{limit} for a map from {cross.shape[0]} to {cross.shape[1]}")
    values, basis = eigh_psd(ridged(gram, ridge))
    solution = refit_down(gram, cross, ridge)
    whitened = solution @ (basis * values.sqrt())
    vectors = eigh_psd(whitened @ whitened.T)[1].flip(1)[:, :rank]
    return balanced_projection(vectors, solution)


def affine_reduced_rank_fit(
    gram: Float[Tensor, "d_in d_in"],
    cross: Float[Tensor, "d_in d_out"],
    x_sum: Float[Tensor, " d_in"],
    y_sum: Float[Tensor, " d_out"],
    count: int,
    rank: int,
    ridge: float,
) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"], Float[Tensor, " d_out"]]:
    """The best map of rank ``rank`` with a bias: ``(a, b, bias)`` for ``y ~ a @ (b @ x) + bias``, float64.

    `reduced_rank_regression` of the deviations from the mean; the bias then makes up for the means exactly.

    Args:
        gram: ``sum x^T x``, not centred.
        cross: ``sum x^T y``, not centred.
        x_sum: ``sum x``.
        y_sum: ``sum y``.
        count: number of tokens in the sums, >= 1.
        rank: inner width.
        ridge: relative to the mean diagonal of the centred Gram.

    Raises:
        RecipeError: no token, or ``rank`` is negative or above ``min(d_in, d_out)``.
    """
    if count < 1:
        raise RecipeError(f"count={count}: an affine fit needs the sums of at least one token")
    x_total, y_total = x_sum.double(), y_sum.double()
    a, b = reduced_rank_regression(*centred(gram, cross, x_total, y_total, count), rank, ridge)
    return a, b, (y_total - a @ (b @ x_total)) / count
