"""Hashing tokens by the signs of projections, and tables of outputs fitted to the buckets without training."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def hyperplanes(
    count: int, d_model: int, generator: torch.Generator, spread: Float[Tensor, "d_model d_model"] | None = None
) -> Float[Tensor, "count d_model"]:
    """Random directions of length one, float64.

    Args:
        count: how many.
        d_model: length of each.
        generator: of the draws, on its device.
        spread: a square root of the covariance that the directions shall have; None draws all directions alike.
    """
    drawn = torch.randn(count, d_model, generator=generator, dtype=torch.float64, device=generator.device)
    if spread is not None:
        drawn = drawn.to(spread.device) @ spread.double()
    length = drawn.norm(dim=1, keepdim=True)
    return drawn / torch.where(length > 0, length, 1.0)


def buckets(projected: Float[Tensor, "*tokens planes"], bits: int) -> Int64[Tensor, "*tokens tables"]:
    """The bucket of every token in every table: the signs of ``bits`` consecutive projections, as a binary number.

    Reference: LookupFFN, arXiv 2403.07221, whose hashes are such signs too.
    """
    *tokens, planes = projected.shape
    signs = (projected > 0).long().reshape(*tokens, planes // bits, bits)
    index: Tensor = (signs << torch.arange(bits, device=projected.device)).sum(-1)
    return index


def shrunken_means(
    residual: Float[Tensor, "tokens d_out"], bucket: Int64[Tensor, " tokens"], size: int, shrink: float
) -> Float[Tensor, "size d_out"]:
    """``sum / (count + shrink)`` of the residuals in every bucket; zero in one without tokens."""
    total = residual.new_zeros(size, residual.shape[1]).index_add_(0, bucket, residual)
    count = torch.bincount(bucket, minlength=size).to(residual)[:, None] + shrink
    return total / torch.where(count > 0, count, 1.0)


def backfit(
    targets: Float[Tensor, "tokens d_out"], index: Int64[Tensor, "tokens tables"], size: int, shrink: float, sweeps: int
) -> Float[Tensor, "tables size d_out"]:
    """Tables whose rows, one of each table a token, add up to the targets.

    Each table in turn takes the shrunken mean of what the others leave, so that ``|residual|^2 + shrink |tables|^2``
    falls with every step; without shrinkage the error itself does.

    Args:
        targets: of the sum.
        index: the bucket of every token in every table.
        size: buckets of a table.
        shrink: tokens that every bucket counts beside its own, all of them zero.
        sweeps: how often each table is fitted.

    Reference: Friedman and Stuetzle, Projection pursuit regression, 1981.
    """
    residual = targets.clone()
    tables = targets.new_zeros(index.shape[1], size, targets.shape[1])
    for _ in range(sweeps):
        for number, table in enumerate(tables):
            bucket = index[:, number]
            residual += table[bucket]
            table.copy_(shrunken_means(residual, bucket, size, shrink))
            residual -= table[bucket]
    return tables
