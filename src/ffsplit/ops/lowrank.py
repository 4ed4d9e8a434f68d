"""Best low-rank factors of a weight, plain or in the norm of its inputs.

Both come from one fact: the best rank-r approximation of ``W`` in the norm ``||M G^(1/2)||_F`` is the projection
``V V^T W`` on the leading left singular vectors ``V`` of ``W G^(1/2)``. Those are eigenvectors of a matrix no larger
than the shorter side of ``W``, which is far cheaper than an SVD and needs no inverse of ``G``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ffsplit.errors import RecipeError
from ffsplit.ops.linalg import eigh_psd, ridged

# Decides between directions that the calibration data never showed, as the plain SVD would; too small to matter else.
TIE_BREAK = 1e-9


def svd_factors(
    weight: Float[Tensor, "out in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """``(a, b)`` with ``a @ b`` the best rank-``rank`` approximation of ``weight`` in the Frobenius norm.

    Returns:
        Balanced factors, float64: ``a^T a = b b^T``, the kept singular values.

    Raises:
        RecipeError: ``rank`` is negative or above ``min(out, in)``.
    """
    dense = weight.double()
    return balanced_projection(leading_left_vectors(dense, _checked_rank(rank, dense)), dense)


def whitened_factors(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """``(a, b)`` minimising ``||x (weight - a b)^T||_F`` over the tokens x whose Gram is ``sum x^T x``.

    A direction of the input that has no energy is treated as the plain SVD would; a zero Gram gives `svd_factors`.

    Args:
        weight: the linear map.
        gram: second moment of its inputs.
        rank: inner width.

    Returns:
        Balanced factors, float64: ``a^T a = b b^T``.

    Raises:
        RecipeError: ``rank`` is negative or above ``min(out, in)``.

    Reference: DRONE (NeurIPS 2021); SVD-LLM, arXiv 2403.07378, section 3.1, in the eigenvector form, which stays
        optimal where the Cholesky factor of a singular Gram does not.
    """
    dense, metric = weight.double(), ridged(gram, TIE_BREAK)
    _checked_rank(rank, dense)
    if dense.shape[0] <= dense.shape[1]:
        vectors = eigh_psd(dense @ metric @ dense.T)[1].flip(1)[:, :rank]
    else:
        values, basis = eigh_psd(metric)
        vectors = leading_left_vectors(dense @ (basis * values.sqrt()), rank)
    return balanced_projection(vectors, dense)


def scaled_factors(
    weight: Float[Tensor, "out in"], scale: Float[Tensor, " in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """``(a, b)`` minimising ``||(weight - a b) diag(scale)||_F``: an input weighs as much as its scale says.

    The truncated SVD of ``weight diag(scale)`` times ``diag(scale)^-1``, in the form that divides by nothing: the
    kept left vectors project ``weight`` itself. An input of scale zero is treated as the plain SVD would.

    Args:
        weight: the linear map.
        scale: one number an input, >= 0; ASVD takes ``mean(|x_i|) ** alpha``. All zero gives `svd_factors`.
        rank: inner width.

    Returns:
        Balanced factors, float64: ``a^T a = b b^T``.

    Raises:
        RecipeError: ``rank`` is negative or above ``min(out, in)``.

    Reference: ASVD, arXiv 2312.05821, with its diagonal scaling matrix.
    """
    dense, wide = weight.double(), scale.double()
    largest = wide.max() if wide.numel() else wide.sum()
    used = torch.where(largest > 0, wide.clamp_min(TIE_BREAK * largest), torch.ones_like(wide))
    return balanced_projection(leading_left_vectors(dense * used, _checked_rank(rank, dense)), dense)


def leading_left_vectors(matrix: Float[Tensor, "out inner"], rank: int) -> Float[Tensor, "out rank"]:
    """Orthonormal leading left singular vectors of ``matrix``, by the eigenvectors of its smaller Gram."""
    if matrix.shape[0] <= matrix.shape[1]:
        return eigh_psd(matrix @ matrix.T)[1].flip(1)[:, :rank]
    right = eigh_psd(matrix.T @ matrix)[1].flip(1)[:, :rank]
    basis: Tensor = torch.linalg.qr(matrix @ right).Q
    return basis


def balanced_projection(
    basis: Float[Tensor, "out rank"], weight: Float[Tensor, "out in"]
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Factors of ``basis basis^T weight`` that share the singular values of the product equally.

    Equal scales on both sides lose the least when the factors are rounded to 16 bits or quantised.
    """
    projected = basis.T @ weight
    rotation = eigh_psd(projected @ projected.T)[1].flip(1)
    rows = rotation.T @ projected
    root = torch.linalg.vector_norm(rows, dim=1).sqrt()
    inverse = torch.where(root > 0, 1.0 / torch.where(root > 0, root, 1.0), 0.0)
    return basis @ (rotation * root), inverse[:, None] * rows


def _checked_rank(rank: int, weight: Float[Tensor, "out in"]) -> int:
    limit = min(weight.shape)
    if not 0 <= rank <= limit:
        raise RecipeError(f"rank={rank} is not in 0..{limit} for a weight of shape {tuple(weight.shape)}")
    return rank
