"""FinerCut: FFN after FFN goes, each time the one whose loss moves the final answers the least."""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field

from ffsplit.budget.dropper import Dropper
from ffsplit.budget.dropping import DroppingConfig, check_dropping, decision, droppable, excess, note
from ffsplit.budget.objective import Metric, Objective
from ffsplit.budget.registry import Decision, planner
from ffsplit.budget.scene import Scene


class FinerCutConfig(DroppingConfig):
    """What is compared after each cut.

    Attributes:
        metric: distance of the final answers from the original model's: ``js``, ``kl``, ``angular`` or ``norm``.
        batches: calibration batches to measure on; every FFN that is left runs them once for every FFN that is dropped.
    """

    method: Literal["finercut"] = "finercut"
    metric: Metric = "js"
    batches: int = Field(2, ge=1)


@planner(
    "finercut",
    summary="drop FFN after FFN, each time the one that moves the final answers the least",
    paper="FinerCut, arXiv 2405.18218, for FFNs",
    budget=("keep",),
    as_sum="dropped FFNs: the empty sum, a bias, or a linear map and a bias; the others dense",
    config=FinerCutConfig,
    check=check_dropping,
)
def finercut(scene: Scene, config: FinerCutConfig) -> Decision:
    """Greedy: what has gone stays gone, and all others are measured again."""
    objective = Objective.of(scene, config.batches)
    score = partial(objective.mean, metric=config.metric)
    free = droppable(scene.shapes, config)
    dropper = Dropper(scene, config.drop, free, score, config.metric, objective.batches)
    dropped: dict[int, float] = {}
    while excess(scene.shapes, config, list(dropped)) > 0:
        damages = dropper.one_more(list(dropped))
        best = min(damages, key=lambda index: (damages[index], index))
        dropped[best] = damages[best]
    note(scene, list(dropped), dropped)
    return decision(len(scene.shapes), list(dropped), config)
