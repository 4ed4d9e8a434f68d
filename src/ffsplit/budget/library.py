"""The candidates of every FFN that an allocation chooses from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ffsplit.budget.scene import Scene
from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import BudgetError, RecipeError
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.budgets import average_bits
from ffsplit.methods.mixed_bits import MixedBitsConfig
from ffsplit.methods.neurons import neuron_scores
from ffsplit.methods.registry import MethodConfig, get_method, method_config
from ffsplit.ops.allocation import split_by_bits
from ffsplit.ops.rounding import decode, encode, fit_grid


class Candidate(NamedTuple):
    """One thing that may happen to an FFN.

    Attributes:
        label: the same for all layers where it means the same.
        config: None leaves the FFN as it is.
    """

    label: str
    config: MethodConfig | None


Row = list[Candidate]
"""Candidates of one FFN."""

KEEP = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
BITS = (2.2, 2.35, 2.5, 2.65, 2.8, 3.0, 3.2, 3.4, 3.7, 4.0, 4.3, 5.0, 6.0, 8.5)
SPARSITY = (0.25, 0.5, 0.75)
GRIDS: Mapping[str, Sequence[float]] = {"keep": KEEP, "bits": BITS, "sparsity": SPARSITY}
NEAR = (0.8, 1.55)
"""Of a bits budget: averages outside this range are not worth measuring for it."""
AFFECTED: Mapping[str, tuple[str, ...]] = {
    "keep": ("keep",),
    "flops": ("keep", "sparsity"),
    "latency": ("keep", "bits", "sparsity"),
    "bits": ("keep", "bits"),
    "bytes": ("keep", "bits"),
}
"""Which budgets of methods change what a budget of the allocation counts."""
WIDTHS = (8, 6, 5, 4, 3, 2)
TRIES = 4
SAMPLE_ROWS = 256
"""Rows of `up` from which the rounding error of each width is taken."""
LINEAR = tuple({"method": "ffsplit", "rest": "linear", "keep": keep} for keep in (0.1, 0.2, 0.3))
DROPPED = {"method": "drop", "replacement": "mean"}
DEFAULTS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "keep": ({"method": "prune"}, *LINEAR, DROPPED),
    "flops": ({"method": "prune"}, *LINEAR, DROPPED),
    "latency": ({"method": "prune"}, DROPPED),
    "bits": ({"method": "mixed-bits"},),
    "bytes": ({"method": "mixed-bits"}, {"method": "prune"}),
}
"""What is tried under each budget unless the recipe names methods: what measured best there."""


def library(
    scene: Scene, methods: Sequence[Mapping[str, Any]], budget: str, *values: float | int | str | None
) -> list[Row]:
    """Every candidate of every FFN: each method at the points of the grid of its budget that it can reach.

    An FFN that the recipe's overrides have settled has one candidate, which counts in the budget like every other.

    Args:
        scene: the dense model; `mixed-bits` looks at its neurons.
        methods: values of method blocks, without a budget where the method has one.
        budget: of the allocation.
        values: of the budget; a share or an average is itself a point of the grid, so that plans which treat all layers
            alike can use it up. None stands for all that the budget could be.

    Raises:
        RecipeError: a method is unknown or cannot be set up like this, or no candidate is possible.
    """
    points = [float(value) for value in values if value is not None] if budget in ("keep", "bits") else []
    rows: list[Row] = [[Candidate("as it is", None)] for _ in scene.shapes]
    for block in methods:
        if block["method"] == "mixed-bits" and "neurons" not in block:
            targets = averages(*(None if value is None or budget != "bits" else float(value) for value in values))
            for index, data in scene.layers(label="neurons"):
                rows[index] += mixed_widths(data, block, targets)
        else:
            for row, shape in zip(rows, scene.shapes, strict=True):
                row += [Candidate(one.model_dump_json(), one) for one in variants(shape, block, budget, *points)]
    for index, config in scene.settled.items():
        rows[index] = [Candidate("as it is" if config is None else config.model_dump_json(), config)]
    if all(len(row) == 1 for row in rows):
        raise RecipeError(f"none of {', '.join(str(block['method']) for block in methods)} can do anything here")
    return rows


def averages(*budgets: float | None) -> list[float]:
    """Average widths to try under some bits budgets; None among them stands for the whole grid."""
    wanted: set[float] = set()
    for budget in budgets:
        low, high = (0.0, math.inf) if budget is None else (NEAR[0] * budget, NEAR[1] * budget)
        wanted |= {bits for bits in BITS if low <= bits <= high} | ({budget} if budget is not None else set())
    return sorted(wanted)


def variants(shape: FFNShape, values: Mapping[str, Any], budget: str, *extra: float) -> Iterator[MethodConfig]:
    """One method at every point of its budget's grid, and some extra ones, that an FFN of this shape can reach.

    Raises:
        RecipeError: the method cannot be set up like this at any point.
    """
    method = get_method(str(values["method"]))
    if not method.budget or any(name in values for name in (*method.budget, *method.config.instead_of_budget)):
        yield method_config(dict(values))
        return
    points: list[dict[str, float]] = [{}] if method.config.budget_is_optional else []
    for kind in (kind for kind in method.budget if kind in AFFECTED[budget]):
        points += [{kind: at} for at in sorted({*GRIDS[kind], *(extra if kind == budget else ())})]
    refused: RecipeError | None = None
    usable = False
    for point in points:
        try:
            config = method_config({**values, **point})
            method.plan(shape, config)
        except BudgetError:
            continue
        except RecipeError as error:
            refused = error  # perhaps a setting that goes with the method's other budget, or with none
            continue
        usable = True
        yield config
    if refused is not None and not usable:
        raise refused


def mixed_widths(data: LayerData, values: Mapping[str, Any], targets: Sequence[float]) -> Iterator[Candidate]:
    """Splits of one FFN's neurons over widths, each the best by score of its average number of bits."""
    base = MixedBitsConfig.model_validate({**values, "neurons": {4: data.ffn.d_ff}})
    shape = FFNShape.of(data.ffn)
    cost = {bits: _bits_of(shape, base, {bits: shape.d_ff}) for bits in WIDTHS}
    error = {bits: _rounding_error(data, base, bits) for bits in WIDTHS}
    energy = neuron_scores(data, base.score).square().cpu()
    told, least = json.dumps(dict(values), sort_keys=True), min(WIDTHS)
    yield Candidate(f"{told}, {least} bits for all", base.model_copy(update={"neurons": {least: shape.d_ff}}))
    for target in targets:
        allowed = target
        for _ in range(TRIES):
            try:
                neurons = split_by_bits(energy, error, cost, allowed, base.group)
            except BudgetError:
                break
            # Every width has scales of its own, which the cost of a neuron alone does not show.
            excess = _bits_of(shape, base, neurons) - target
            if excess <= 0:
                yield Candidate(f"{told} at {target} bits", base.model_copy(update={"neurons": neurons}))
                break
            allowed -= excess


def _bits_of(shape: FFNShape, config: MixedBitsConfig, neurons: Mapping[int, int]) -> float:
    """Stored bits a weight of an FFN split like this, everything counted."""
    config = config.model_copy(update={"neurons": dict(neurons)})
    return average_bits(get_method(config.method).plan(shape, config), shape)


@torch.no_grad()
def _rounding_error(data: LayerData, config: MixedBitsConfig, bits: int) -> float:
    """Relative squared error of some rows of `up` rounded to nearest."""
    rows = data.ffn.up[:SAMPLE_ROWS].float()
    grid = fit_grid(rows, bits, config.group, symmetric=config.symmetric, scale_bits=config.scale_bits, search=True)
    error = decode(encode(rows, grid, bits), grid, torch.float32) - rows
    return float(error.square().sum() / rows.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
