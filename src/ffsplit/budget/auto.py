"""The allocator: measure what every candidate does to every layer, then choose the best of each under one budget."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ffsplit.budget.cost import Cost, cost_of, dense_spec, number_of, parse_bytes, parse_latency
from ffsplit.budget.damage import measure
from ffsplit.budget.knapsack import choose
from ffsplit.budget.library import DEFAULTS, Row, library, variants
from ffsplit.budget.objective import Metric, Objective
from ffsplit.budget.registry import Decision, PlannerConfig, planner
from ffsplit.budget.scene import Scene
from ffsplit.errors import BudgetError, FFSplitError, RecipeError
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.methods.neurons import GRADIENT_SCORES
from ffsplit.methods.registry import MethodConfig, get_method, lookup, method_config, methods

logger = logging.getLogger(__name__)
BUDGETS = ("keep", "bits", "bytes", "flops", "latency")


class AutoConfig(PlannerConfig):
    """One budget over all FFNs together, and what may be used to meet it.

    Attributes:
        keep: share of all FFN parameters that stay, weights at 16 bits.
        bits: average stored bits per FFN weight, scales, zeros and biases counted.
        bytes: of all the model's weights together, such as `80MB`.
        flops: share of the FFNs' multiply-accumulates, those that selectors leave out not counted.
        latency: share of the dense FFNs' time on this device and the tokens of a forward, such as `0.7x@tokens=1`.
        methods: what to choose from: names, or method blocks with settings but without a budget. Empty: what measured
            best under this kind of budget.
        windows: calibration batches on which damage is measured.
        metric: divergence of the final answers: `kl`, `js`, `angular` or `norm`.
        trials: how many plans are really carried out and compared: the allocation first, then the best of those that
            treat all layers alike. With 1 the prediction is trusted.
    """

    method: Literal["auto"] = "auto"
    keep: float | None = Field(None, gt=0, le=1)
    bits: float | None = Field(None, gt=0, le=16)
    bytes: int | str | None = None
    flops: float | None = Field(None, gt=0, le=1)
    latency: str | None = None
    methods: tuple[dict[str, Any], ...] = ()
    windows: int = Field(8, ge=1)
    metric: Metric = "kl"
    trials: int = Field(2, ge=1, le=8)

    @field_validator("methods", mode="before")
    @classmethod
    def _blocks(cls, value: object) -> object:
        """Names as blocks; an unknown one is refused here, before anything is read."""
        if not isinstance(value, Sequence) or isinstance(value, str):
            return value
        blocks = [{"method": one} if isinstance(one, str) else one for one in value]
        for block in blocks:
            try:
                lookup(str(block.get("method")), methods())
            except FFSplitError as error:
                raise ValueError(str(error)) from error
        return tuple(blocks)

    @model_validator(mode="after")
    def _one_budget(self) -> AutoConfig:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one budget: {', '.join(BUDGETS)}; got {', '.join(given) or 'none'}")
        try:
            if self.bytes is not None:
                parse_bytes(self.bytes)
            if self.latency is not None:
                parse_latency(self.latency)
        except RecipeError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def budget(self) -> str:
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def value(self) -> Any:
        """Of the budget, as it was given."""
        return getattr(self, self.budget)

    @property
    def blocks(self) -> tuple[Mapping[str, Any], ...]:
        """The method blocks, with the defaults of the budget's kind."""
        return self.methods or DEFAULTS[self.budget]

    @property
    def needs_gradients(self) -> bool:
        return any(block.get("score") in GRADIENT_SCORES for block in self.blocks) and not self.full_budget

    @property
    def full_budget(self) -> bool:
        return self.keep == 1 or self.bits == 16 or self.flops == 1


def check(shapes: Sequence[FFNShape], config: AutoConfig) -> None:
    """Refuse a parameter budget that the given methods cannot reach; other units need the model itself."""
    if config.keep is None:
        return
    cheapest = 0
    for shape in shapes:
        specs = [dense_spec(shape)]
        for block in config.blocks:
            specs += [get_method(one.method).plan(shape, one) for one in variants(shape, block, "keep", config.keep)]
        cheapest += min(spec.parameters for spec in specs)
    total = sum(shape.parameters for shape in shapes)
    if cheapest > config.keep * total:
        names = ", ".join(str(block["method"]) for block in config.blocks)
        raise BudgetError(
            f"keep={config.keep} is out of reach with {names}; the smallest reachable keep is {cheapest / total:.4f}"
        )


@planner(
    "auto",
    summary="measure candidates of any methods in every layer, choose the best of each under one budget",
    paper="Puzzle, arXiv 2411.19146 (library, scores, integer program); measured on the final answers",
    budget=("keep", "bits"),
    as_sum="whatever was chosen, layer by layer",
    config=AutoConfig,
    check=check,
)
def auto(scene: Scene, config: AutoConfig) -> Decision:
    """Library, damages, knapsack; then the plan is carried out beside the best one that treats all layers alike."""
    if config.full_budget:
        return _nothing_to_do(scene)
    cost = cost_of(scene, config.budget, config.value)
    rows = library(scene, config.blocks, config.budget, config.value)
    costs = costs_of(rows, cost, scene.shapes)
    refuse_beyond(cost, costs, config.budget, config.value)
    if sum(row[0] for row in costs) <= cost.limit:  # the dense FFNs meet it
        return _nothing_to_do(scene)
    objective = Objective.of(scene, config.windows)
    damages = measured(scene, rows, objective, config.metric)
    chosen = choose(damages, costs, cost.limit)
    plans = [chosen, *uniform(rows, damages, costs, cost.limit)][: config.trials if scene.trial else 1]
    outcomes = [_tried(scene, rows, plan, objective, config.metric) for plan in plans] if len(plans) > 1 else [None]
    best = min(range(len(plans)), key=lambda index: outcomes[index] or 0.0)
    scene.notes["allocation"] = report(scene, rows, damages, costs, plans, outcomes, best, cost)
    return [rows[layer][index].config for layer, index in enumerate(plans[best])]


def refuse_beyond(cost: Cost, costs: Sequence[Sequence[float]], budget: str, value: float | int | str) -> None:
    """Refuse, before anything is measured, a budget below the cheapest candidates of all layers.

    Raises:
        BudgetError: it is; the message says the smallest that can be reached.
    """
    least = sum(min(row) for row in costs)
    if cost.in_unit(least) > number_of(budget, value) * (1 + 1e-9):
        raise BudgetError(f"{budget}={value} is out of reach; the smallest reachable is {cost.describe(least)}")


def costs_of(rows: Sequence[Row], cost: Cost, shapes: Sequence[FFNShape]) -> list[list[float]]:
    """What every candidate costs."""

    def planned(config: MethodConfig | None, shape: FFNShape) -> SumSpec:
        return dense_spec(shape) if config is None else get_method(config.method).plan(shape, config)

    return [
        [cost.of(planned(one.config, shape), layer) for one in row]
        for layer, (row, shape) in enumerate(zip(rows, shapes, strict=True))
    ]


def measured(scene: Scene, rows: Sequence[Row], objective: Objective, metric: Metric) -> list[list[float]]:
    """What every candidate damages; an FFN left as it is, nothing."""
    tried = [[one for _, one in row if one is not None] for row in rows]
    found = [iter(row) for row in measure(scene, tried, objective, metric)]
    return [[0.0 if one is None else next(values) for _, one in row] for row, values in zip(rows, found, strict=True)]


def uniform(
    rows: Sequence[Row], damages: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], limit: float
) -> list[list[int]]:
    """Plans that give every layer the same candidate and meet the limit, the least predicted damage first.

    Layers with one candidate have that one in all of them.
    """
    places = [{one.label: index for index, one in enumerate(row) if one.config is not None} for row in rows]
    free = [row for row, place in zip(rows, places, strict=True) if len(row) > 1 and place]
    labels = places[rows.index(free[0])] if free else {}
    plans = [
        [0 if len(row) == 1 else place[label] for row, place in zip(rows, places, strict=True)]
        for label in labels
        if all(len(row) == 1 or label in place for row, place in zip(rows, places, strict=True))
    ]

    def total(values: Sequence[Sequence[float]], plan: Sequence[int]) -> float:
        return sum(row[index] for row, index in zip(values, plan, strict=True))

    fitting = [plan for plan in plans if total(costs, plan) <= limit]
    return sorted(fitting, key=lambda plan: total(damages, plan))


def _tried(scene: Scene, rows: Sequence[Row], plan: Sequence[int], objective: Objective, metric: Metric) -> float:
    assert scene.trial is not None
    decision = [row[index].config for row, index in zip(rows, plan, strict=True)]
    return scene.trial(decision, partial(objective.now, metric))


def report(
    scene: Scene,
    rows: Sequence[Row],
    damages: Sequence[Sequence[float]],
    costs: Sequence[Sequence[float]],
    plans: Sequence[Sequence[int]],
    outcomes: Sequence[float | None],
    best: int,
    cost: Cost,
) -> dict[str, Any]:
    """What was chosen, what it was predicted to do, and what it did."""

    def summary(plan: Sequence[int], outcome: float | None) -> dict[str, Any]:
        spent = sum(row[index] for row, index in zip(costs, plan, strict=True))
        return {
            "predicted_damage": sum(row[index] for row, index in zip(damages, plan, strict=True)),
            "measured_damage": outcome,
            "cost": cost.describe(spent),
            "value": cost.in_unit(spent),
        }

    return {
        "chosen": "allocation" if best == 0 else "uniform",
        "plans": [
            {"plan": "allocation" if number == 0 else "uniform", **summary(plan, outcome)}
            for number, (plan, outcome) in enumerate(zip(plans, outcomes, strict=True))
        ],
        "layers": [
            {
                "ffn": scene.found.sites[layer].name,
                "method": None if (one := rows[layer][index].config) is None else one.model_dump(mode="json"),
                "damage": damages[layer][index],
            }
            for layer, index in enumerate(plans[best])
        ],
    }


def _nothing_to_do(scene: Scene) -> Decision:
    """A full budget, or one that the dense model meets.

    Every FFN becomes its own dense branch, so that the result goes the way of every other.
    """
    return [method_config({"method": "prune", "keep": 1.0}) for _ in scene.shapes]
