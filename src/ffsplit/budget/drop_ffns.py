"""Dropping the least important FFNs, all at once, by one measurement of the dense model."""

from __future__ import annotations

from typing import Literal

from ffsplit.budget.dropping import DroppingConfig, check_dropping, decision, least_important
from ffsplit.budget.importance import UpdateMetric, update_importance
from ffsplit.budget.registry import Decision, planner
from ffsplit.budget.scene import Scene


class DropFFNsConfig(DroppingConfig):
    """What makes an FFN important.

    Attributes:
        metric: what the FFN does to the residual stream: ``cosine``: the angle by which it turns it (LLM-Drop);
            ``relative-l1``, ``relative-l2``: the size of its output beside the stream's (2407.16286; SNIP);
            ``block-influence``: the angle by which its whole block turns it (ShortGPT).
    """

    method: Literal["drop-ffns"] = "drop-ffns"
    metric: UpdateMetric = "cosine"


@planner(
    "drop-ffns",
    summary="drop the least important FFNs, measured once on the dense model",
    paper="LLM-Drop 2406.15786, 2407.16286, ShortGPT 2403.03853, SNIP 2010.01791 (by `metric`)",
    budget=("keep",),
    as_sum="dropped FFNs: the empty sum, a bias, or a linear map and a bias; the others dense",
    config=DropFFNsConfig,
    check=check_dropping,
)
def drop_ffns(scene: Scene, config: DropFFNsConfig) -> Decision:
    """The FFNs of the lowest importance go until the budget is met."""
    scores = update_importance(scene, config.metric, config.batches)
    return decision(len(scene.shapes), least_important(scene.shapes, config, scores), config)
