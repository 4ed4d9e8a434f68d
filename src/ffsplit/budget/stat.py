"""STAT: a width for every FFN from the rank that its activations really have."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ffsplit.budget.registry import Decision, PlannerConfig, planner
from ffsplit.budget.scene import Scene
from ffsplit.budget.widths import pruned_to
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.budgets import align_up
from ffsplit.ops.selection import pivoted_qr_order

logger = logging.getLogger(__name__)


class StatConfig(PlannerConfig):
    """How exactly the kept neurons must span the activations of all. There is no budget: what stays follows.

    Attributes:
        tol: neurons are picked by pivoted QR of the activations until no other neuron's remainder is above this
            fraction of the largest neuron's norm; larger keeps fewer neurons, one at least.
        ridge: pull of the refit of `down` to the old weights, relative to the mean diagonal of the hidden Gram.
        align: every width is rounded up to a multiple of this (hardware likes 64 or 128).
    """

    method: Literal["stat"] = "stat"
    tol: float = Field(0.1, gt=0, lt=1)
    ridge: float = Field(1e-3, ge=0)
    align: int = Field(1, ge=1)


def check(shapes: Sequence[FFNShape], config: StatConfig) -> None:
    """Every model and every tolerance will do."""


@planner(
    "stat",
    summary="a width for every FFN by pivoted QR of its activations up to a tolerance, `down` refitted",
    paper="STAT, arXiv 2406.00061",
    budget=(),
    as_sum="one dense branch of the kept neurons, of a width of its own in every FFN",
    config=StatConfig,
    check=check,
)
def stat(scene: Scene, config: StatConfig) -> Decision:
    """Count the pivots above the tolerance in the dense model; the same QR then chooses the neurons at that width."""
    widths = [0] * len(scene.shapes)
    for index, data in scene.layers():
        pivots = len(pivoted_qr_order(data.statistics.hidden_gram, tol=config.tol))
        widths[index] = align_up(max(pivots, 1), config.align, scene.shapes[index].d_ff)
    kept = sum(width * shape.neuron_parameters for width, shape in zip(widths, scene.shapes, strict=True))
    total = sum(shape.d_ff * shape.neuron_parameters for shape in scene.shapes)
    logger.info("tol=%g keeps %.1f %% of the neurons' parameters, widths %s", config.tol, 100 * kept / total, widths)
    return [
        pruned_to(width, shape, score="pivoted_qr", ridge=config.ridge)
        for width, shape in zip(widths, scene.shapes, strict=True)
    ]
