"""One choice a layer, the least total damage, within a budget: a multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ffsplit.errors import BudgetError

Rows = Sequence[Sequence[float]]
GAP = 1e-6
"""Relative gap to the optimum at which the solver may stop; damages are not measured more exactly."""
SLACK = 1e-6
"""Share of the limit by which the solver may overspend without noticing."""
ROUNDING = 1e-9
"""Share by which a limit may be off: 0.29 of 100 is a little less than 29."""


def choose(damages: Rows, costs: Rows, limit: float) -> list[int]:
    """The choice in every layer that has the least total damage of all that cost ``limit`` at most.

    Damages are added up, as if each were done alone. Infinite ones are never chosen.

    Args:
        damages: of each layer's choices.
        costs: of each layer's choices, in any unit, >= 0.
        limit: what all choices may cost together.

    Returns:
        The index of the choice in every layer.

    Raises:
        BudgetError: even the cheapest choices cost more; the message says how much.

    Reference: Puzzle, arXiv 2411.19146, the mixed-integer program over a library of blocks; solved by HiGHS.
    """
    finite = [[float(np.isfinite(value)) for value in row] for row in damages]
    usable = [[index for index, good in enumerate(row) if good] for row in finite]
    cheapest = sum(min((costs[n][i] for i in row), default=np.inf) for n, row in enumerate(usable))
    spendable = limit * (1 + ROUNDING)
    if cheapest > spendable:
        raise BudgetError(f"the cheapest choices cost {cheapest:g} together and {limit:g} is allowed")
    chosen = _solved(damages, costs, usable, spendable)
    if chosen is None:
        raise BudgetError(f"the solver found no choice within {limit:g}")
    if _total(costs, chosen) > spendable:
        # What the solver takes for within the limit may be a hair above it: the same hair below it.
        chosen = _solved(damages, costs, usable, spendable * (1 - 2 * SLACK))
    if chosen is None or _total(costs, chosen) > spendable:
        return [_cheapest(damage, cost, np.inf) for damage, cost in zip(damages, costs, strict=True)]
    return chosen


def _total(costs: Rows, chosen: Sequence[int]) -> float:
    return sum(row[index] for row, index in zip(costs, chosen, strict=True))


def _solved(damages: Rows, costs: Rows, usable: Sequence[Sequence[int]], limit: float) -> list[int] | None:
    """The best choice among the usable ones, up to the solver's tolerances; None if it finds none."""
    flat = [(layer, index) for layer, row in enumerate(usable) for index in row]
    damage = np.array([damages[layer][index] for layer, index in flat])
    cost = np.array([costs[layer][index] for layer, index in flat])
    unit = damage.max() if damage.size and damage.max() > 0 else 1.0
    layers = np.array([layer for layer, _ in flat])
    one_each = csr_array((np.ones(len(flat)), (layers, np.arange(len(flat)))), shape=(len(damages), len(flat)))
    scale = max(limit, 1e-30)
    solved = milp(
        damage / unit,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(csr_array((cost / scale)[None]), -np.inf, 1)],
        options={"mip_rel_gap": GAP},
    )
    return None if solved.x is None else [flat[position][1] for position in np.flatnonzero(solved.x > 0.5)]


def front(damages: Rows, costs: Rows) -> list[list[int]]:
    """Choices along the lower convex hull of total damage over total cost, the cheapest first.

    Each is the best of its cost: it minimises ``damage + price * cost`` for some price of a unit of cost.
    """
    prices = sorted({0.0, np.inf, *_prices(damages, costs)}, reverse=True)
    found: list[list[int]] = []
    for price in prices:
        chosen = [_cheapest(d, c, price) for d, c in zip(damages, costs, strict=True)]
        if not found or chosen != found[-1]:
            found.append(chosen)
    return found


def _prices(damages: Rows, costs: Rows) -> list[float]:
    """Prices just below those at which a layer's best choice changes."""
    prices = []
    for damage, cost in zip(damages, costs, strict=True):
        hull = _hull(damage, cost)
        steps = [(damage[a] - damage[b]) / (cost[b] - cost[a]) for a, b in pairwise(hull)]
        prices += [step * (1 - 1e-9) for step in steps]
    return prices


def _hull(damage: Sequence[float], cost: Sequence[float]) -> list[int]:
    """Choices on the lower convex hull, by rising cost and falling damage."""
    order = sorted((i for i in range(len(cost)) if np.isfinite(damage[i])), key=lambda i: (cost[i], damage[i]))
    hull: list[int] = []
    for index in order:
        if hull and damage[index] >= damage[hull[-1]]:
            continue
        if hull and cost[index] == cost[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(damage, cost, hull[-2], hull[-1]) >= _slope(damage, cost, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def _slope(damage: Sequence[float], cost: Sequence[float], first: int, second: int) -> float:
    return (damage[second] - damage[first]) / (cost[second] - cost[first])


def _cheapest(damage: Sequence[float], cost: Sequence[float], price: float) -> int:
    if price == np.inf:
        return min((i for i in range(len(cost)) if np.isfinite(damage[i])), key=lambda i: (cost[i], damage[i]))
    return min(
        (i for i in range(len(cost)) if np.isfinite(damage[i])), key=lambda i: (damage[i] + price * cost[i], cost[i])
    )
