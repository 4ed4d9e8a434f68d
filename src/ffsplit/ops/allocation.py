"""Sharing out a budget inside one FFN, from scores alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ffsplit.errors import BudgetError

ROUNDS = 60
"""Bisections of the price of a bit; each halves the interval of its logarithm."""


def split_by_bits(
    energy: Float[Tensor, " d_ff"],
    error: Mapping[int, float],
    cost: Mapping[int, float],
    target: float,
    group: int,
) -> dict[int, int]:
    """How many neurons get how many bits, the most energetic ones the most, under an average cost a neuron.

    Minimises ``sum_j energy_j * error[bits_j]``: to each group of neurons goes the width that minimises its error plus
    a price times its cost, and the price is the lowest that meets the target. Error grows in proportion to energy, so
    in order of energy the widths only fall, and each width is one contiguous branch.

    Args:
        energy: squared output norm of every neuron, in any order.
        error: relative squared error of a weight at each width.
        cost: of a neuron at each width, in any unit.
        target: mean cost of a neuron that must not be exceeded.
        group: neurons are assigned in groups of this many; the last may be short.

    Returns:
        Neurons of each width that is used, the widest first.

    Raises:
        BudgetError: even the cheapest width is above the target.
    """
    ordered = energy.double().sort(descending=True).values
    pieces = torch.split(ordered, group)
    totals = torch.stack([piece.sum() for piece in pieces])
    sizes = torch.tensor([len(piece) for piece in pieces], dtype=torch.float64)
    widths = sorted(error, reverse=True)
    errors = torch.tensor([error[bits] for bits in widths], dtype=torch.float64)
    costs = torch.tensor([cost[bits] for bits in widths], dtype=torch.float64)
    if float(costs.min()) > target:
        raise BudgetError(f"the cheapest width costs {float(costs.min()):.3f} a neuron and {target:.3f} is allowed")

    def assigned(price: float) -> Tensor:
        return (totals.cpu()[:, None] * errors + price * sizes[:, None] * costs).argmin(1)

    def spent(chosen: Tensor) -> float:
        return float((costs[chosen] * sizes).sum() / sizes.sum())

    # At the high price the cheapest width wins everywhere, so the target is met there.
    low, high = 1e-30, float(totals.max() * errors.max()) * 1e6 + 1.0
    for _ in range(ROUNDS):
        price = (low * high) ** 0.5
        low, high = (low, price) if spent(assigned(price)) <= target else (price, high)
    best = assigned(high)
    best = _filled(best, totals.cpu(), sizes, errors, costs, target)
    counts = {bits: int(sizes[best == index].sum()) for index, bits in enumerate(widths)}
    return {bits: count for bits, count in counts.items() if count}


def _filled(chosen: Tensor, totals: Tensor, sizes: Tensor, errors: Tensor, costs: Tensor, target: float) -> Tensor:
    """Spend what the price left over: widen group after group, the most energetic first, while the target allows."""
    left = target * float(sizes.sum()) - float((costs[chosen] * sizes).sum())
    filled = chosen.clone()
    for index in range(len(filled)):
        wider = int(filled[index]) - 1
        # Widths must not rise again along the order: a group may at most catch up with the one before it.
        if wider < 0 or (index and wider < int(filled[index - 1])):
            continue
        extra = float((costs[wider] - costs[filled[index]]) * sizes[index])
        if 0 < extra <= left:
            filled[index] = wider
            left -= extra
    return filled
