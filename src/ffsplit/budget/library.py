"""The candidates of every FFN that an allocation chooses from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ffsplit.budget.scene import Scene
from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import BudgetError, RecipeError
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.budgets import average_bits, packed_branch_spec, sum_spec
from ffsplit.methods.mixed_bits import MixedBitsConfig
from ffsplit.methods.neurons import neuron_scores
from ffsplit.methods.registry import MethodConfig, get_method, method_config
from ffsplit.ops.allocation import split_by_bits
from ffsplit.ops.rounding import decode, encode, fit_grid

Row = list[MethodConfig | None]
"""Candidates of one FFN; None leaves it as it is."""

KEEP = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
BITS = (2.2, 2.35, 2.5, 2.65, 2.8, 3.0, 3.2, 3.4, 3.7, 4.0, 4.3, 5.0, 6.0, 8.5)
SPARSITY = (0.25, 0.5, 0.75)
GRIDS: Mapping[str, Sequence[float]] = {"keep": KEEP, "bits": BITS, "sparsity": SPARSITY}
WIDTHS = (8, 6, 5, 4, 3, 2)
SAMPLE_ROWS = 256
"""Rows of `up` from which the rounding error of each width is taken."""
LINEAR = tuple({"method": "ffsplit", "rest": "linear", "keep": keep} for keep in (0.1, 0.2, 0.3))
DEFAULTS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "keep": ({"method": "prune"}, *LINEAR),
    "flops": ({"method": "prune"}, *LINEAR),
    "latency": ({"method": "prune"},),
    "bits": ({"method": "mixed-bits"},),
    "bytes": ({"method": "mixed-bits"}, {"method": "prune"}),
}
"""What is tried under each budget unless the recipe names methods: what measured best there."""


def library(scene: Scene, methods: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Every candidate of every FFN: each method at the points of the grid of its budget that it can reach.

    Args:
        scene: the dense model; `mixed-bits` looks at its neurons.
        methods: values of method blocks, without a budget where the method has one.

    Raises:
        RecipeError: a method is unknown, or no candidate is possible.
    """
    rows: list[Row] = [[None] for _ in scene.shapes]
    for values in methods:
        if values["method"] == "mixed-bits" and "neurons" not in values:
            for index, data in scene.layers(label="neurons"):
                rows[index] += mixed_widths(data, values)
        else:
            for row, shape in zip(rows, scene.shapes, strict=True):
                row += list(variants(shape, values))
    if all(len(row) == 1 for row in rows):
        raise RecipeError(f"none of {', '.join(str(values['method']) for values in methods)} can do anything here")
    return rows


def variants(shape: FFNShape, values: Mapping[str, Any]) -> Iterator[MethodConfig]:
    """One method at every point of its budget's grid that an FFN of this shape can reach."""
    method = get_method(str(values["method"]))
    given = [budget for budget in method.budget if budget in values]
    if given or not method.budget:
        yield method_config(dict(values))
        return
    for budget in method.budget:
        for value in GRIDS[budget]:
            try:
                config = method_config({**values, budget: value})
                method.plan(shape, config)
            except (BudgetError, RecipeError):
                continue  # out of reach for this shape, or a setting that goes with another budget
            yield config


def mixed_widths(data: LayerData, values: Mapping[str, Any]) -> Iterator[MixedBitsConfig]:
    """Splits of one FFN's neurons over widths, each the best by score of its average number of bits."""
    base = MixedBitsConfig.model_validate({**values, "neurons": {4: data.ffn.d_ff}})
    shape = FFNShape.of(data.ffn)
    cost = {bits: _bits_of(shape, base, bits) for bits in WIDTHS}
    error = {bits: _rounding_error(data, base, bits) for bits in WIDTHS}
    energy = neuron_scores(data, base.score).square().cpu()
    seen: list[dict[int, int]] = []
    for target in BITS:
        try:
            neurons = split_by_bits(energy, error, cost, target, base.group)
        except BudgetError:
            continue
        if neurons not in seen:
            seen.append(neurons)
            yield base.model_copy(update={"neurons": neurons})


def _bits_of(shape: FFNShape, config: MixedBitsConfig, bits: int) -> float:
    """Stored bits a weight of an FFN in one width, everything counted."""
    branch = packed_branch_spec(shape, shape.d_ff, bits, config.group, config.symmetric, config.scale_bits)
    return average_bits(sum_spec(shape, [branch], bias=shape.down_bias), shape)


@torch.no_grad()
def _rounding_error(data: LayerData, config: MixedBitsConfig, bits: int) -> float:
    """Relative squared error of some rows of `up` rounded to nearest."""
    rows = data.ffn.up[:SAMPLE_ROWS].float()
    grid = fit_grid(rows, bits, config.group, symmetric=config.symmetric, scale_bits=config.scale_bits, search=True)
    error = decode(encode(rows, grid, bits), grid, torch.float32) - rows
    return float(error.square().sum() / rows.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
