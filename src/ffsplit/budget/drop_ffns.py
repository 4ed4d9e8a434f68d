"""Dropping the least important FFNs or attentions, all at once, by one measurement of the dense model."""

from __future__ import annotations

from functools import partial
from typing import Literal, cast

import torch
from pydantic import Field

from ffsplit.budget.dropper import Dropper
from ffsplit.budget.dropping import DroppingConfig, candidates, check_dropping, decided, least_important
from ffsplit.budget.importance import PER_TOKEN, UpdateMetric, update_importance
from ffsplit.budget.language import check_causal, mask_gradients, mean_loss
from ffsplit.budget.objective import Metric, Objective
from ffsplit.budget.registry import Decision, planner
from ffsplit.budget.scene import Scene
from ffsplit.ops.shapley import shapley_values

Importance = UpdateMetric | Metric | Literal["loss", "shapley", "mask-gradient"]


class DropFFNsConfig(DroppingConfig):
    """What makes an FFN, or an attention, important.

    Attributes:
        metric: either what it does to the residual stream: ``cosine``: the angle by which it turns it (LLM-Drop);
            ``relative-l1``, ``relative-l2``: the size of its output beside the stream's (2407.16286; SNIP);
            ``block-influence``: the angle by which its whole block turns it (ShortGPT). Or what becomes of the final
            answers when it alone is dropped, with its replacement in place: ``kl``, ``js``, ``angular``, ``norm``:
            their distance from the dense model's; ``loss``: the next-token loss; ``shapley``: the rise in ``kl``,
            averaged over random sets of others that are dropped already. Or ``mask-gradient``: the gradient of the
            next-token loss with respect to a mask on it, by one backward pass.
        permutations: random orders of dropping for ``shapley``, each of which runs the model once a candidate.
    """

    method: Literal["drop-ffns"] = "drop-ffns"
    metric: Importance = "cosine"
    permutations: int = Field(4, ge=1)


@planner(
    "drop-ffns",
    summary="drop the least important FFNs or attentions, measured once on the dense model",
    paper="LLM-Drop 2406.15786, 2407.16286, ShortGPT 2403.03853, SNIP 2010.01791, 2005.00561 (by `metric`)",
    budget=("keep",),
    as_sum="dropped FFNs: the empty sum, a bias, or a linear map and a bias; the others dense",
    config=DropFFNsConfig,
    check=check_dropping,
)
def drop_ffns(scene: Scene, config: DropFFNsConfig) -> Decision:
    """What has the lowest importance goes until the budget is met."""
    scores = importance(scene, config)
    dropped = least_important(scene.shapes, config, scores)
    return decided(scene, dropped, scores, config)


def importance(scene: Scene, config: DropFFNsConfig) -> dict[int, float]:
    """The score of everything that may be dropped, by its place in ``scene.sub_layers``.

    Raises:
        ModelError: the model does not have what the metric looks at.
    """
    metric, free = config.metric, candidates(scene, config)
    if metric in PER_TOKEN:
        scores = update_importance(scene, cast(UpdateMetric, metric), config.batches)
        return {index: scores[index] for index in free}
    if metric in ("loss", "mask-gradient"):
        check_causal(scene, metric)
    if metric == "mask-gradient":
        gradients = mask_gradients(scene, config.batches)
        return {index: gradients[index] for index in free}
    if metric == "loss":
        score = mean_loss(scene, config.batches)
        return Dropper(scene, config.drop, free, score, metric, config.batches).one_more([])
    distance = cast(Metric, "kl" if metric == "shapley" else metric)
    objective = Objective.of(scene, config.batches)
    dropper = Dropper(scene, config.drop, free, partial(objective.mean, metric=distance), distance, objective.batches)
    if metric != "shapley":
        return dropper.one_more([])
    generator = torch.Generator().manual_seed(scene.seed)
    return shapley_values(free, dropper.score, config.permutations, generator)
