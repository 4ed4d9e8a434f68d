"""The whole front of predicted damage over cost, from one measurement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ffsplit.budget.auto import AutoConfig, costs_of, measured, refuse_beyond, uniform
from ffsplit.budget.cost import Cost, cost_of
from ffsplit.budget.knapsack import front
from ffsplit.budget.library import Row, library
from ffsplit.budget.objective import Objective
from ffsplit.budget.scene import Scene


def survey(scene: Scene, config: AutoConfig, values: Sequence[float | int | str] = ()) -> dict[str, Any]:
    """Measure what the allocator would, and allocate under every budget of its kind at once.

    Args:
        scene: the dense model; its store keeps the measurements for the allocations to follow.
        config: of the allocator; the value of its budget does not matter.
        values: of budgets that will be carried out: their candidates are measured too.

    Returns:
        Plain values: ``points`` on the lower convex hull, the cheapest first, each with its cost as a number
        (``value``) and in words, the predicted damage, and for every FFN the place of its choice in ``choices``;
        ``uniform``, the same for plans that treat all layers alike.

    Raises:
        BudgetError: one of the values is out of reach; nothing has been measured then.
    """
    cost = cost_of(scene, config.budget, config.value)
    rows = library(scene, config.blocks, config.budget, None, *values)
    costs = costs_of(rows, cost, scene.shapes)
    for value in values:
        refuse_beyond(cost, costs, config.budget, value)
    damages = measured(scene, rows, Objective.of(scene, config.windows), config.metric)
    choices = _choices(rows)
    alike = uniform(rows, damages, costs, float("inf"))
    return {
        "budget": config.budget,
        "unit": cost.unit,
        "metric": config.metric,
        "ffns": [site.name for site in scene.found.sites],
        "choices": [None if one is None else one.model_dump(mode="json") for one in choices],
        "points": list(_points(rows, damages, costs, cost, front(damages, costs), choices)),
        "uniform": list(_points(rows, damages, costs, cost, alike, choices)),
    }


def _choices(rows: Sequence[Row]) -> list[Any]:
    """Every candidate of any layer once; configurations are frozen, so equal ones count as one."""
    found: list[Any] = []
    for row in rows:
        found += [one.config for one in row if one.config not in found]
    return found


def _points(
    rows: Sequence[Row],
    damages: Sequence[Sequence[float]],
    costs: Sequence[Sequence[float]],
    cost: Cost,
    plans: Iterable[Sequence[int]],
    choices: Sequence[Any],
) -> Iterable[dict[str, Any]]:
    for plan in plans:
        spent = sum(row[index] for row, index in zip(costs, plan, strict=True))
        yield {
            "value": cost.in_unit(spent),
            "cost": cost.describe(spent),
            "predicted_damage": sum(row[index] for row, index in zip(damages, plan, strict=True)),
            "layers": [choices.index(row[index].config) for row, index in zip(rows, plan, strict=True)],
        }
