"""Solving with Gram matrices that may be singular: dead neurons, few tokens, duplicated columns.

Everything runs in float64 on the device of its input. A ridge is always relative: ``ridge=1e-3`` adds one thousandth
of the mean diagonal, so one value fits every layer whatever the scale of its activations.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

EPSILON = torch.finfo(torch.float64).eps


def diagonal_scale(gram: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """The mean diagonal of a Gram, or one where the Gram is zero or empty: the unit of every relative ridge."""
    diagonal = gram.diagonal().double()
    mean = diagonal.sum() / max(diagonal.numel(), 1)
    return torch.where(mean > 0, mean, torch.ones_like(mean))


def ridged(gram: Float[Tensor, "n n"], ridge: float) -> Float[Tensor, "n n"]:
    """``gram + ridge * mean(diag) * I``, float64, exactly symmetric; a new tensor."""
    symmetric = gram.double()
    symmetric = (symmetric + symmetric.T) / 2
    symmetric.diagonal().add_(ridge * diagonal_scale(gram))
    return symmetric


def eigh_psd(gram: Float[Tensor, "n n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Eigenvalues (ascending, clamped at zero) and eigenvectors (columns) of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(ridged(gram, 0.0))
    return values.clamp_min(0.0), vectors


def cholesky_or_none(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"] | None:
    """The lower Cholesky factor, or None if the matrix is not positive definite to working precision.

    A factorization of a singular matrix may succeed on rounding noise alone; a pivot below ``n * eps`` of the
    largest diagonal entry therefore counts as zero.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if matrix.shape[0] == 0:
        return factor
    pivots = factor.diagonal().square()
    floor = matrix.shape[0] * EPSILON * matrix.diagonal().max()
    return factor if bool((info == 0) & (pivots.min() > floor)) else None


def shifted_cholesky(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The lower Cholesky factor; of a matrix that is not positive definite, after the shift that makes it so."""
    factor = cholesky_or_none(matrix)
    if factor is None:
        lowest = torch.linalg.eigvalsh(matrix)[0]
        shift = 1e-8 * diagonal_scale(matrix) - lowest.clamp_max(0.0)
        factor = torch.linalg.cholesky(matrix + torch.diag(shift.expand(len(matrix))))
    return factor


def solve_psd(gram: Float[Tensor, "n n"], rhs: Float[Tensor, "n m"], ridge: float = 0.0) -> Float[Tensor, "n m"]:
    """``(gram + ridge * mean(diag) * I)^+ rhs``: Cholesky, or the pseudo-inverse where that fails.

    Args:
        gram: positive semi-definite up to rounding.
        rhs: right-hand sides, one per column.
        ridge: relative to the mean diagonal, >= 0.

    Returns:
        The solution, float64; of minimum norm where the matrix is singular.
    """
    matrix, right = ridged(gram, ridge), rhs.double()
    factor = cholesky_or_none(matrix)
    if factor is not None:
        return torch.cholesky_solve(right, factor)
    values, vectors = eigh_psd(matrix)
    return vectors @ (pseudo_inverse(values)[:, None] * (vectors.T @ right))


def inverse_psd(gram: Float[Tensor, "n n"], ridge: float = 0.0) -> Float[Tensor, "n n"]:
    """The inverse (pseudo-inverse if singular) of ``gram + ridge * mean(diag) * I``, float64, symmetric."""
    matrix = ridged(gram, ridge)
    factor = cholesky_or_none(matrix)
    if factor is not None:
        return torch.cholesky_inverse(factor)
    values, vectors = eigh_psd(matrix)
    return (vectors * pseudo_inverse(values)) @ vectors.T


def schur_complement(gram: Float[Tensor, "n n"], known: slice, mine: slice, ridge: float) -> Float[Tensor, "m m"]:
    """The Gram of the columns ``mine`` less what their best linear fit from the columns ``known`` explains; float64.

    Args:
        gram: of all columns.
        known: what explains.
        mine: what is explained.
        ridge: of the fit, relative to the mean diagonal of the known columns' Gram.
    """
    wide = gram.double()
    left = wide[mine, mine] - wide[mine, known] @ solve_psd(wide[known, known], wide[known, mine], ridge)
    return (left + left.T) / 2


def pseudo_inverse(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """One over each value, and zero for the values that are zero to working precision next to the largest one."""
    if values.numel() == 0:
        return values
    usable = values > values.numel() * EPSILON * values.max()
    return torch.where(usable, 1.0 / torch.where(usable, values, 1.0), 0.0)
