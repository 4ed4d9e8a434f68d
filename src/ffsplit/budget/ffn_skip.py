"""FFN-SkipLLM: tokens skip FFNs where the residual stream has saturated, and only there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ffsplit.budget.importance import update_importance
from ffsplit.budget.registry import Decision, PlannerConfig, planner
from ffsplit.budget.scene import Scene
from ffsplit.errors import BudgetError, ModelError, RecipeError
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.skip_gate import SkipGateConfig
from ffsplit.ops.skip_gate import Target


class FFNSkipConfig(PlannerConfig):
    """Where tokens may skip FFNs, how many do, and how they are told.

    Attributes:
        sparsity: share of all pairs of FFN and token, over all FFNs of the model, whose FFN is skipped on the
            calibration text, at least 0 and below 1. The FFNs of the saturated region divide it evenly.
        threshold: an FFN is saturated when the cosine of the residual stream before and after it, averaged over
            tokens, is at least this. The default is ours.
        min_layers: the saturated region is the longest run of saturated FFNs; one shorter than this is none, and the
            model is refused.
        protect_first: so many FFNs at the beginning are never skipped (the paper's cold region).
        protect_last: so many FFNs at the end are never skipped.
        target: what the gate of an FFN predicts, as in `skip-gate`: ``norm`` or ``energy``.
        instead: what a skipped token gets, as in `skip-gate`: the ``mean`` output of the skipped tokens, or ``zero`` as
            in the paper.
        ridge: of the gate's regression, relative to the mean variance of the inputs.
        batches: calibration batches to measure saturation on; the gates are fitted on all of them.
    """

    method: Literal["ffn-skip"] = "ffn-skip"
    sparsity: float = Field(ge=0, lt=1)
    threshold: float = Field(0.9, ge=-1, lt=1)
    min_layers: int = Field(2, ge=1)
    protect_first: int = Field(1, ge=0)
    protect_last: int = Field(1, ge=0)
    target: Target = "norm"
    instead: Literal["mean", "zero"] = "mean"
    ridge: float = Field(1e-2, ge=0)
    batches: int = Field(8, ge=1)

    @property
    def needs_data(self) -> bool:
        return not self.full_budget

    @property
    def full_budget(self) -> bool:
        return self.sparsity == 0

    def gate(self, sparsity: float) -> SkipGateConfig:
        """The method of an FFN of the region."""
        return SkipGateConfig(sparsity=sparsity, target=self.target, instead=self.instead, ridge=self.ridge)


def check(shapes: Sequence[FFNShape], config: FFNSkipConfig) -> None:
    """Refuse what no saturation could make possible.

    Raises:
        RecipeError: the FFNs that are never skipped leave fewer than ``min_layers``.
        BudgetError: those that are left could not skip that much; says what is out of reach.
    """
    left = len(shapes) - config.protect_first - config.protect_last
    if left < config.min_layers:
        raise RecipeError(
            f"protect_first={config.protect_first} and protect_last={config.protect_last} leave {max(left, 0)} of the "
            f"{len(shapes)} FFNs to skip; min_layers={config.min_layers} asks for more"
        )
    _share(config.sparsity, left, len(shapes))


def _share(sparsity: float, region: int, count: int) -> float:
    """The sparsity of every FFN of a region that gives the whole model the asked one."""
    if sparsity * count >= region:
        raise BudgetError(
            f"sparsity={sparsity} of all FFNs is out of reach when {region} of {count} may be skipped; it must be "
            f"below {region / count:.4f}"
        )
    return sparsity * count / region


@planner(
    "ffn-skip",
    summary="tokens skip FFNs in the middle layers, where the residual stream has saturated",
    paper="FFN-SkipLLM, arXiv 2404.03865 (where to skip); who skips is told by the gate of `skip-gate` (ours)",
    budget=("sparsity",),
    as_sum="saturated FFNs: one dense branch of all neurons, skipped by some tokens; the others dense",
    config=FFNSkipConfig,
    check=check,
    status="experimental",
)
def ffn_skip(scene: Scene, config: FFNSkipConfig) -> Decision:
    """Measure the saturation of the dense model's stream, gate the FFNs of the longest saturated run.

    Raises:
        ModelError: no run is long enough; the message has every FFN's cosine.
        BudgetError: the run cannot skip that much.
    """
    count = len(scene.shapes)
    if config.full_budget:
        return [config.gate(0.0)] * count
    cosines = [1 - distance for distance in update_importance(scene, "cosine", config.batches)]
    region = saturated_region(cosines, config)
    share = _share(config.sparsity, len(region), count)
    names = [site.name for site in scene.found.sites]
    scene.notes["cosines"] = dict(zip(names, cosines, strict=True))
    scene.notes["saturated"] = [names[index] for index in region]
    return [config.gate(share) if index in region else None for index in range(count)]


def saturated_region(cosines: Sequence[float], config: FFNSkipConfig) -> range:
    """The longest run of FFNs at or above the threshold, the cold ones at both ends left out; of equals the first.

    Args:
        cosines: of the stream before and after each FFN, in execution order.
        config: says where it may lie and how long it must be.

    Raises:
        ModelError: it is shorter than ``min_layers``.
    """
    best, start = range(0), config.protect_first
    for index in range(config.protect_first, len(cosines) - config.protect_last):
        if cosines[index] < config.threshold:
            start = index + 1
        elif index + 1 - start > len(best):
            best = range(start, index + 1)
    if len(best) < config.min_layers:
        measured = ", ".join(f"{index}: {cosine:.3f}" for index, cosine in enumerate(cosines))
        raise ModelError(
            f"no saturated region: of the FFNs after the first {config.protect_first} and before the last "
            f"{config.protect_last}, no {config.min_layers} in a row (min_layers) leave the residual stream's "
            f"direction at a cosine of threshold={config.threshold} or more, so skipping FFNs would hurt. Measured "
            f"cosines of the stream before and after each FFN: {measured}"
        )
    return best
