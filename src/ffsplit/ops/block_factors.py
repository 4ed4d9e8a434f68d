"""Matrices made of block-diagonal factors: block-dense and Monarch (block-shuffle).

Block-dense is ``u blkdiag(v)``: every block of columns is a low-rank matrix of its own. Monarch splits the rows as
well, so that every cell of a grid of row and column blocks has its own low rank; each block of rows is then a
block-dense matrix, and one algorithm fits both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ffsplit.errors import RecipeError
from ffsplit.ops.linalg import eigh_psd, pseudo_inverse, ridged, solve_psd
from ffsplit.ops.lowrank import TIE_BREAK, balanced_projection, leading_left_vectors, svd_factors

# A sweep that lowers the error by less than this share of it is the last one.
CONVERGED = 1e-4
Factors = tuple[Tensor, Tensor]
"""``(a [out, rank], b [rank, width])`` of one block of columns."""


def block_size(size: int, blocks: int) -> int:
    """Width of each of ``blocks`` blocks over ``size`` columns; the last one is filled up with zeros."""
    return -(-size // blocks)


def whole_blocks(size: int, blocks: int) -> int:
    """The largest number of blocks, at most ``blocks``, that leaves none of them empty."""
    return -(-size // block_size(size, min(blocks, size)))


def block_dense_factors(
    weight: Float[Tensor, "out in"],
    blocks: int,
    block_rank: int,
    gram: Float[Tensor, "in in"] | None = None,
    sweeps: int = 0,
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "blocks block_rank width"]]:
    """``(u, v)`` with ``u blkdiag(v)`` near ``weight``: the SVD of every block of columns, or a fit to a Gram.

    Without sweeps it is optimal in the Frobenius norm. Sweeps minimise ``||x (weight - u blkdiag(v))^T||_F`` over the
    tokens whose Gram is ``gram``. The first goes through the blocks, each making up for the errors of those before it
    (or starts from the SVD, should that be better); every further one solves all of ``u`` for the given ``v`` and then
    both factors of each block for the given other blocks. These are exact minima, so no further sweep raises the error.

    Args:
        weight: the linear map.
        blocks: of columns, each ``ceil(in / blocks)`` wide, the last filled up with zeros.
        block_rank: rank of each block; what is above the rank that a block can have is filled up with zeros.
        gram: second moment of the inputs; None leaves out the sweeps.
        sweeps: at most so many; they end early when they no longer change the error.

    Returns:
        Factors, float64. The columns of ``u`` are those of the first block, then of the second, and so on; the two
        factors of each block are balanced.

    Raises:
        RecipeError: ``blocks`` is not in 1..in or leaves an empty block, or ``block_rank`` is negative.

    Reference: BlockDense of StructuredFFN, arXiv 2406.16450, which trains it; the fit to a given matrix is ours.
    """
    dense = weight.double()
    columns = _columns(dense, blocks, block_rank)
    metric = Metric.of(gram, columns) if gram is not None and sweeps else None
    return _stacked(_fitted(dense, columns, block_rank, metric, sweeps), block_rank)


def monarch_factors(
    weight: Float[Tensor, "out in"],
    blocks: int,
    cell_rank: int,
    gram: Float[Tensor, "in in"] | None = None,
    sweeps: int = 0,
) -> tuple[Float[Tensor, "blocks inner width"], Float[Tensor, "blocks height inner"]]:
    """``(first, second)``: the block-diagonal factors of the Monarch matrix near ``weight``.

    Row r belongs to row block ``r mod blocks``, column c to column block ``c // width``. The cell where row block j
    meets column block i has rank ``cell_rank``: it is the sum over k of column ``k * blocks + i`` of ``second[j]``
    times row ``j * cell_rank + k`` of ``first[i]``. Without sweeps each cell is cut by its SVD, which is optimal in the
    Frobenius norm. With a Gram each block of rows is fitted by the sweeps of `block_dense_factors`; their errors add.

    Args:
        weight: the linear map.
        blocks: of rows and of columns.
        cell_rank: rank of each cell; what is above the rank that a cell can have is filled up with zeros.
        gram: second moment of the inputs; None leaves out the sweeps.
        sweeps: at most so many.

    Returns:
        Factors, float64, with ``inner = blocks * cell_rank``; zero beyond the rows and columns of ``weight``.

    Raises:
        RecipeError: ``blocks`` is not in 1..min(out, in) or leaves an empty block, or ``cell_rank`` is negative.

    Reference: Monarch, arXiv 2204.00595, algorithm 1 (cells of rank 1); BlockShuffle of StructuredFFN, arXiv
        2406.16450. The fit to a Gram is ours.
    """
    dense = weight.double()
    columns = _columns(dense, blocks, cell_rank)
    if blocks > dense.shape[0]:
        raise RecipeError(f"blocks={blocks} is not in 1..{dense.shape[0]} for {dense.shape[0]} rows")
    metric = Metric.of(gram, columns) if gram is not None and sweeps else None
    first = dense.new_zeros(blocks, blocks, cell_rank, block_size(dense.shape[1], blocks))
    second = dense.new_zeros(blocks, block_size(dense.shape[0], blocks), cell_rank, blocks)
    for j in range(blocks):
        rows = dense[j::blocks]
        u, v = _stacked(_fitted(rows, columns, cell_rank, metric, sweeps), cell_rank)
        first[:, j] = v
        second[j, : len(rows)] = u.reshape(len(rows), blocks, cell_rank).transpose(1, 2)
    return first.flatten(1, 2), second.flatten(2, 3)


@dataclass(frozen=True)
class Metric:
    """The Gram in whose norm a matrix is fitted, and what each block of columns needs of its own part of it.

    Attributes:
        gram: of all columns, positive definite.
        roots: ``r`` of each block with ``r r^T`` its own part.
        inverses: of each block's own part.
    """

    gram: Float[Tensor, "in in"]
    roots: tuple[Tensor, ...]
    inverses: tuple[Tensor, ...]

    @classmethod
    def of(cls, gram: Float[Tensor, "in in"], columns: Sequence[slice]) -> Metric:
        """Directions without inputs count as little as in `whitened_factors`."""
        metric = ridged(gram, TIE_BREAK)
        parts = [eigh_psd(metric[own, own]) for own in columns]
        return cls(
            metric,
            tuple(basis * values.sqrt() for values, basis in parts),
            tuple((basis * pseudo_inverse(values)) @ basis.T for values, basis in parts),
        )

    def error(self, residual: Float[Tensor, "out in"]) -> float:
        """``||x residual^T||_F^2``."""
        return float((residual @ self.gram * residual).sum())


def _columns(weight: Float[Tensor, "out in"], blocks: int, rank: int) -> list[slice]:
    """The columns of every block."""
    size = weight.shape[1]
    if not 1 <= blocks <= size or whole_blocks(size, blocks) != blocks:
        raise RecipeError(f"blocks={blocks} is not in 1..{size}, or leaves an empty block of {size} columns")
    if rank < 0:
        raise RecipeError(f"rank={rank} of a block is negative")
    width = block_size(size, blocks)
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def _fitted(
    weight: Float[Tensor, "out in"], columns: Sequence[slice], rank: int, metric: Metric | None, sweeps: int
) -> list[Factors]:
    """Factors of every block of columns."""
    ranks = [min(rank, *weight[:, own].shape) for own in columns]
    parts = [svd_factors(weight[:, own], own_rank) for own, own_rank in zip(columns, ranks, strict=True)]
    if metric is None:
        return parts
    plain = metric.error(_residual(weight, columns, parts))
    swept, error = _in_turn(weight, torch.zeros_like(weight), columns, ranks, metric)
    parts, best = (parts, plain) if plain <= error else (swept, error)
    for _ in range(sweeps - 1):
        start = _residual(weight, columns, _solved_left(weight, columns, parts, metric))
        swept, error = _in_turn(weight, start, columns, ranks, metric)
        if error >= best:
            break
        finished = best - error <= CONVERGED * best
        parts, best = swept, error
        if finished:
            break
    return parts


def _residual(
    weight: Float[Tensor, "out in"], columns: Sequence[slice], parts: Sequence[Factors]
) -> Float[Tensor, "out in"]:
    return torch.cat([weight[:, own] - a @ b for own, (a, b) in zip(columns, parts, strict=True)], dim=1)


def _in_turn(
    weight: Float[Tensor, "out in"],
    start: Float[Tensor, "out in"],
    columns: Sequence[slice],
    ranks: Sequence[int],
    metric: Metric,
) -> tuple[list[Factors], float]:
    """Each block anew, optimal given the residual of the others, and the error in the end.

    Completing the square: what the other blocks leave to this one is its own weight plus their residual regressed on
    this block's inputs. The best low rank of that in the norm of those inputs is the minimum over both its factors.
    """
    residual, parts = start.clone(), []
    for own, rank, root, inverse in zip(columns, ranks, metric.roots, metric.inverses, strict=True):
        others = residual @ metric.gram[:, own] - residual[:, own] @ metric.gram[own, own]
        target = weight[:, own] + others @ inverse
        a, b = balanced_projection(leading_left_vectors(target @ root, rank), target)
        residual[:, own] = weight[:, own] - a @ b
        parts.append((a, b))
    return parts, metric.error(residual)


def _solved_left(
    weight: Float[Tensor, "out in"], columns: Sequence[slice], parts: Sequence[Factors], metric: Metric
) -> list[Factors]:
    """The left factors of all blocks together, by least squares for the given right ones."""
    rights = [(own, b) for own, (_, b) in zip(columns, parts, strict=True)]
    projected = torch.cat([b @ metric.gram[own] for own, b in rights])
    inner = torch.cat([projected[:, own] @ b.T for own, b in rights], dim=1)
    left = solve_psd(inner, projected @ weight.T).T
    return list(zip(torch.split(left, [len(b) for _, b in rights], dim=1), (b for _, b in rights), strict=True))


def _stacked(parts: Sequence[Factors], rank: int) -> tuple[Tensor, Tensor]:
    """Factors of equal size, as one matrix and one stack."""
    width = max(b.shape[1] for _, b in parts)
    u = parts[0][0].new_zeros(len(parts[0][0]), len(parts), rank)
    v = parts[0][0].new_zeros(len(parts), rank, width)
    for block, (a, b) in enumerate(parts):
        u[:, block, : a.shape[1]] = a
        v[block, : b.shape[0], : b.shape[1]] = b
    return u.flatten(1), v
