"""Pivoted symmetric elimination: the engine under every greedy neuron selection.

Eliminating index p from a positive semi-definite matrix ``A`` with rows ``X`` attached to its indices means

    l = A[:, p] / sqrt(A[p, p]),   A <- A - l l^T,   X <- X - l X[p] / sqrt(A[p, p]).

* ``A = C`` (the hidden Gram): ``A`` becomes the residual Gram after projecting on the picked neurons, so picking the
  largest diagonal is pivoted QR of the activations. With ``X = C V`` attached (``V = down^T``), ``||X_j||^2 / A_jj``
  is the output error that picking j would remove.
* ``A = C^-1``: picking means pruning, ``A`` becomes the inverse Gram of the neurons left. With ``X = V`` attached,
  ``X`` is always the refitted ``down`` and ``||X_j||^2 / A_jj`` the output error that pruning j would add (OBS).

Updates are gathered in blocks and applied as matrix products; only the diagonal and the row norms are kept current,
which is all that a choice needs. No value travels to the host before the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ffsplit.ops.linalg import EPSILON

FLUSH = 64


class Elimination:
    """The state of one elimination; see the module's text for the mathematics.

    Attributes:
        diagonal: current diagonal of ``A``.
        energy: current squared row norms of ``X``.
        picked: which indices are eliminated.
    """

    def __init__(
        self,
        matrix: Float[Tensor, "n n"],
        attached: Float[Tensor, "n m"],
        floor: Float[Tensor, "..."] | None = None,
    ) -> None:
        """Start from ``matrix`` [n, n] and ``attached`` [n, m], both copied to float64.

        Args:
            matrix: positive semi-definite.
            attached: rows carried along; [n, 0] if there are none.
            floor: diagonal entries up to this count as zero, one value or one per index; by default ``eps`` of their
                sum.
        """
        self._matrix, self._attached = matrix.double().clone(), attached.double().clone()
        size, width = self._attached.shape
        self._left, self._right = self._matrix.new_zeros(size, FLUSH), self._matrix.new_zeros(FLUSH, width)
        self._pending = 0
        self.diagonal = self._matrix.diagonal().clone()
        self.energy = self._attached.square().sum(1)
        self.picked = torch.zeros(size, dtype=torch.bool, device=matrix.device)
        rounding = EPSILON * self.diagonal.abs().sum() if floor is None else floor
        self._floor = rounding.to(self.diagonal).expand(size)

    def gain(self) -> Float[Tensor, " n"]:
        """``||X_j||^2 / A_jj``, zero where nothing is left of ``A_jj``."""
        usable = self.diagonal > self._floor
        return torch.where(usable, self.energy / torch.where(usable, self.diagonal, 1.0), 0.0)

    def pick(self, indices: Int[Tensor, " b"]) -> None:
        """Eliminate the indices, one after another. They must be distinct and not picked before."""
        for index in torch.split(indices, 1):
            if self._pending == FLUSH:
                self._flush()
            self._pick_one(index)

    def _pick_one(self, index: Int[Tensor, " 1"]) -> None:
        done = slice(0, self._pending)
        coefficients = self._left[:, done][index]
        column = self._matrix.index_select(0, index)[0] - self._left[:, done] @ coefficients[0]
        row = self._attached[index] - coefficients @ self._right[done]
        pivot = column[index]
        factor = torch.where(pivot > self._floor[index], pivot.clamp_min(torch.finfo(pivot.dtype).tiny).rsqrt(), 0.0)
        left, right = column * factor, row[0] * factor
        along = self._attached @ right - self._left[:, done] @ (self._right[done] @ right)
        self.diagonal = self.diagonal - left.square()
        self.energy = (self.energy - 2 * left * along + left.square() * right.square().sum()).clamp_min(0.0)
        self._left[:, self._pending], self._right[self._pending] = left, right
        self._pending += 1
        self.picked[index] = True

    def _flush(self) -> None:
        """Apply the gathered updates, and replace what was tracked by exact values."""
        self._matrix.addmm_(self._left, self._left.T, alpha=-1)
        self._attached.addmm_(self._left, self._right, alpha=-1)
        self.diagonal = self._matrix.diagonal().clone()
        self.energy = self._attached.square().sum(1)
        self._pending = 0


def eliminate(
    state: Elimination, count: int, score: Callable[[Elimination], Float[Tensor, " n"]], block: int = 1
) -> tuple[Int[Tensor, " count"], Float[Tensor, " count"]]:
    """Pick ``count`` indices, always those of the largest score among the ones left.

    Args:
        state: changed in place.
        count: how many to pick.
        score: larger = picked earlier.
        block: indices picked per evaluation of the scores; more is faster and greedier.

    Returns:
        The indices in the order of picking, and the score that each was picked with.
    """
    order, scores = [], []
    for start in range(0, count, block):
        left = score(state).masked_fill(state.picked, -torch.inf)
        values, indices = left.topk(min(block, count - start))
        state.pick(indices)
        order.append(indices)
        scores.append(values)
    if not order:
        return state.picked.new_empty(0, dtype=torch.int64), state.diagonal.new_empty(0)
    return torch.cat(order), torch.cat(scores)
