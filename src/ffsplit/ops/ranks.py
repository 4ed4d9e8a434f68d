"""Dividing a budget over the ranks of several matrices by what their truncation loses."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from ffsplit.errors import RecipeError
from ffsplit.ops.linalg import eigh_psd


def truncation_spectrum(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"] | None = None
) -> Float[Tensor, " spectrum"]:
    """What each further rank saves: the squared singular values of ``weight G^(1/2)``, largest first, float64.

    The sum of those beyond rank r is the smallest ``||x (weight - rank r)^T||_F^2`` over the tokens whose Gram is
    ``gram`` (None: ``||weight - rank r||_F^2``), so no factors are needed to know the loss.

    Reference: SVD-LLM, arXiv 2403.07378; the theoretical truncation loss of SVD-LLM v2, arXiv 2503.12340.
    """
    wide = weight.double()
    if wide.shape[0] <= wide.shape[1]:
        product = wide @ wide.T if gram is None else wide @ gram.double() @ wide.T
        return eigh_psd(product)[0].flip(0)
    if gram is not None:
        values, basis = eigh_psd(gram)
        wide = wide @ (basis * values.sqrt())
    return eigh_psd(wide.T @ wide)[0].flip(0)


def allocate_ranks(
    spectra: Sequence[Float[Tensor, " _"]], costs: Sequence[int], budget: int, floor: float = 0.5
) -> list[int]:
    """Ranks that lose the least in all, within a budget.

    Every matrix starts at its floor; then the rank that saves the most for each parameter is bought, as long as one
    can be paid for. Spectra fall, so what is bought before the first rank that cannot be paid is optimal for what it
    costs; with equal costs the whole allocation is optimal.

    Losses of different matrices are compared as they are. Divide a spectrum by its sum for relative losses.

    Args:
        spectra: of each matrix, what every further rank saves, largest first (see `truncation_spectrum`).
        costs: parameters of one rank of each matrix, >= 1.
        budget: parameters in all.
        floor: no matrix gets less than this share of the uniform rank, 0 to 1; the uniform rank is the largest that
            all matrices can have together.

    Raises:
        RecipeError: the lists differ in length, a cost is below 1, the budget is negative, or ``floor`` out of range.

    Reference: SVD-LLM v2, arXiv 2503.12340 (ranks by theoretical loss); the floor is the finding of Swift-SVD that
        allocation without one hurts.
    """
    if len(spectra) != len(costs):
        raise RecipeError(f"{len(spectra)} spectra and {len(costs)} costs: one of each is needed for every matrix")
    if any(cost < 1 for cost in costs) or budget < 0 or not 0 <= floor <= 1:
        raise RecipeError(f"costs={list(costs)}, budget={budget}, floor={floor}: costs >= 1, budget >= 0, floor 0 to 1")
    gains = [spectrum.double().cpu().tolist() for spectrum in spectra]
    uniform = uniform_rank([len(gain) for gain in gains], costs, budget)
    ranks = [min(int(floor * uniform), len(gain)) for gain in gains]
    return _buy(ranks, gains, costs, budget - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)))


def _buy(ranks: list[int], gains: Sequence[Sequence[float]], costs: Sequence[int], left: int) -> list[int]:
    """Raise ranks, the one that saves the most for each parameter first, while ``left`` parameters pay for it."""
    bought = list(ranks)
    queue = [
        (-gain[rank] / cost, index)
        for index, (gain, rank, cost) in enumerate(zip(gains, ranks, costs, strict=True))
        if rank < len(gain)
    ]
    heapq.heapify(queue)
    while queue:
        _, index = heapq.heappop(queue)
        if costs[index] > left:
            continue  # what is left only shrinks: this matrix is done
        bought[index] += 1
        left -= costs[index]
        if bought[index] < len(gains[index]):
            heapq.heappush(queue, (-gains[index][bought[index]] / costs[index], index))
    return bought


def uniform_rank(limits: Sequence[int], costs: Sequence[int], budget: int) -> int:
    """The largest rank that all matrices can have together, each up to its own limit."""
    rank = 0
    while rank < max(limits, default=0):
        needed = sum(min(rank + 1, limit) * cost for limit, cost in zip(limits, costs, strict=True))
        if needed > budget:
            break
        rank += 1
    return rank


def weighted_ranks(weights: Sequence[float], limits: Sequence[int], costs: Sequence[int], budget: int) -> list[int]:
    """The largest ranks in the proportion of ``weights`` that fit the budget, 1 at least and their limit at most.

    Args:
        weights: relative rank of each matrix, > 0; equal weights give the uniform rank.
        limits: the largest rank of each.
        costs: parameters of one rank of each.
        budget: parameters in all.

    Returns:
        One rank a matrix.

    Raises:
        RecipeError: rank 1 for all is above the budget.
    """

    def at(scale: float) -> list[int]:
        # A hair above the product: k / weight * weight may round to just below k.
        return [
            max(1, min(int(scale * weight * (1 + 1e-12)), limit)) for weight, limit in zip(weights, limits, strict=True)
        ]

    def fits(ranks: Sequence[int]) -> bool:
        return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)) <= budget

    if not fits(at(0.0)):
        raise RecipeError(f"budget={budget} is below {sum(costs)}, which rank 1 of every matrix takes")
    # The ranks change only at these scales, and their cost rises with the scale.
    steps = sorted(
        {rank / weight for weight, limit in zip(weights, limits, strict=True) for rank in range(1, limit + 1)}
    )
    low, high = -1, len(steps)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(at(steps[middle])) else (low, middle)
    return at(steps[low]) if low >= 0 else at(0.0)
