"""FinerCut: one sub-layer after the other goes, each time the one whose loss moves the final answers the least."""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field

from ffsplit.budget.dropper import Dropper
from ffsplit.budget.dropping import DroppingConfig, candidates, check_dropping, decided, excess
from ffsplit.budget.objective import Metric, Objective
from ffsplit.budget.registry import Decision, planner
from ffsplit.budget.scene import Scene


class FinerCutConfig(DroppingConfig):
    """What is compared after each cut.

    Attributes:
        metric: distance of the final answers from the original model's: ``js``, ``kl``, ``angular`` or ``norm``.
        batches: calibration batches to measure on; all that is left runs them once for everything that is dropped.
    """

    method: Literal["finercut"] = "finercut"
    metric: Metric = "js"
    batches: int = Field(2, ge=1)


@planner(
    "finercut",
    summary="drop FFNs or attentions one by one, each time the one that moves the final answers the least",
    paper="FinerCut, arXiv 2405.18218",
    budget=("keep",),
    as_sum="dropped FFNs: the empty sum, a bias, or a linear map and a bias; the others dense",
    config=FinerCutConfig,
    check=check_dropping,
)
def finercut(scene: Scene, config: FinerCutConfig) -> Decision:
    """Greedy: what has gone stays gone, and all others are measured again."""
    free = candidates(scene, config)
    objective = Objective.of(scene, config.batches)
    score = partial(objective.mean, metric=config.metric)
    dropper = Dropper(scene, config.drop, free, score, config.metric, objective.batches)
    dropped: dict[int, float] = {}
    while excess(scene.shapes, config, list(dropped)) > 0:
        damages = dropper.one_more(list(dropped))
        best = min(damages, key=lambda index: (damages[index], index))
        dropped[best] = damages[best]
    return decided(scene, list(dropped), dropped, config)
