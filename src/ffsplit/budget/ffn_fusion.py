"""FFN Fusion: FFNs that follow each other, because the attention between them is gone, run as one wide FFN."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from pydantic import Field

from ffsplit.budget.fusion import Run, adding, joinable, runs_of
from ffsplit.budget.fusion_error import Trial, runs_within
from ffsplit.budget.importance import UpdateMetric, update_importance
from ffsplit.budget.registry import Decision, PlannerConfig, planner
from ffsplit.budget.scene import Scene
from ffsplit.errors import ModelError, RecipeError
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.fused import FusedConfig


class FFNFusionConfig(PlannerConfig):
    """How much attention goes, which FFNs may run side by side, and how wide they may become.

    Attributes:
        count: self-attentions that are left out, the least important first.
        metric: of their importance, as in `drop-ffns`.
        tol: FFNs become one only as far as that moves the residual stream behind them by at most this share of its
            norm, the mean over calibration tokens; null fuses whatever sees one input, unmeasured. The default is
            ours.
        longest: FFNs that become one, at most; null for no limit.
        protect_first: so many attentions at the beginning stay.
        protect_last: so many attentions at the end stay.
        batches: calibration batches to measure on.
    """

    method: Literal["ffn-fusion"] = "ffn-fusion"
    count: int = Field(ge=1)
    metric: UpdateMetric = "cosine"
    tol: float | None = Field(0.1, gt=0)
    longest: int | None = Field(None, ge=2)
    protect_first: int = Field(0, ge=0)
    protect_last: int = Field(0, ge=0)
    batches: int = Field(8, ge=1)

    @property
    def looks_at_attention(self) -> bool:
        return True


def check(shapes: Sequence[FFNShape], config: FFNFusionConfig) -> None:
    """Refuse a model without two consecutive FFNs of one shape.

    Raises:
        RecipeError: there are none.
    """
    if not any(first == second for first, second in pairwise(shapes)):
        raise RecipeError(f"no two consecutive FFNs of equal shape among {len(shapes)}: there is nothing to fuse")


@planner(
    "ffn-fusion",
    summary="leave out attention, and run the FFNs that then follow each other as one wide FFN",
    paper="FFN Fusion 2503.18908, after attention dropping as in LLM-Drop 2406.15786",
    budget=(),
    as_sum="one dense branch of the neurons of several FFNs in the first of them, the empty sum in the others",
    config=FFNFusionConfig,
    check=check,
    status="experimental",
    example={"count": 2},
)
def ffn_fusion(scene: Scene, config: FFNFusionConfig) -> Decision:
    """The least important attentions go; of the FFNs that then see one input those are joined that bear it.

    Raises:
        RecipeError: fewer attentions may go than shall, or no two FFNs follow each other then.
        ModelError: FFNs see different inputs even then, or no two stay within ``tol``; the message has what was
            measured.
    """
    count = len(scene.shapes)
    free = list(range(len(scene.attention)))[config.protect_first : len(scene.attention) - config.protect_last]
    if config.count > len(free):
        raise RecipeError(f"count={config.count}: only {len(free)} of {len(scene.attention)} attentions may go")
    adding_ones = adding(scene)
    _refuse_unlike(scene, adding_ones)
    scores = update_importance(scene, config.metric, config.batches)[count:]
    gone = sorted(sorted(free, key=lambda place: (scores[place], place))[: config.count])
    pairs = joinable(scene, gone, adding_ones)
    if not any(pairs):
        raise RecipeError(f"count={config.count}: no two FFNs follow each other without these attentions; drop more")
    runs = _runs(scene, config, gone, pairs)
    names = [site.name for site in scene.sub_layers]
    scene.left_out[:] = gone
    scene.notes["dropped"] = [names[count + place] for place in gone]
    scene.notes["scores"] = {names[count + place]: scores[place] for place in free}
    scene.notes["fused"] = [[names[index] for index in run] for run in runs]
    decision: Decision = [None] * count
    for run in runs:
        for place, index in enumerate(run):
            decision[index] = FusedConfig(members=run, place=place)
    return decision


def _runs(scene: Scene, config: FFNFusionConfig, gone: Sequence[int], pairs: Sequence[bool]) -> list[Run]:
    """What is joined; says in the scene's notes what was measured, and which FFNs stay alone for it.

    Raises:
        ModelError: nothing stays within the tolerance.
    """
    if config.tol is None:
        return runs_of(pairs, config.longest)
    runs, trials = runs_within(scene, gone, pairs, config.longest, config.tol, config.batches)
    if not runs:
        measured = ", ".join(f"{list(trial.members)}: {trial.error:.3f}" for trial in trials)
        raise ModelError(
            f"no two FFNs stay within tol={config.tol} side by side; measured: {measured}. Raise tol, drop other "
            "attentions, or leave attention out without fusing (drop-ffns, target: attention)"
        )
    names = [site.name for site in scene.found.sites]
    scene.notes["tried"] = [
        {"ffns": [names[index] for index in trial.members], "error": trial.error, "within": trial.error <= config.tol}
        for trial in trials
    ]
    scene.notes["unfused"] = {names[index]: why for index, why in _alone(runs, trials, pairs, config.tol).items()}
    return runs


def _alone(runs: Sequence[Run], trials: Sequence[Trial], pairs: Sequence[bool], tol: float) -> dict[int, str]:
    """Why FFNs that see one input with a neighbour run alone all the same."""
    fused = {index for run in runs for index in run}
    could = [index for index in range(len(pairs) + 1) if any(pairs[max(index - 1, 0) : index + 1])]
    return {index: _reason(index, trials, tol) for index in could if index not in fused}


def _reason(index: int, trials: Sequence[Trial], tol: float) -> str:
    """What was tried with an FFN at one end. It stayed alone, so all of that failed."""
    failed = [
        f"fused with {', '.join(str(member) for member in trial.members if member != index)} it moves the stream by "
        f"{trial.error:.3g}"
        for trial in trials
        if index in (trial.members[0], trial.members[-1])
    ]
    return f"{' and '.join(failed)}, above tol={tol:g}" if failed else "the run before it is as long as longest allows"


def _refuse_unlike(scene: Scene, adding_ones: set[int]) -> None:
    """Raise ModelError if not even without all attention two FFNs would see one input."""
    if not any(joinable(scene, range(len(scene.attention)), adding_ones)):
        raise ModelError(
            f"no two FFNs of {type(scene.model).__name__} see the same input without the attention between them; that "
            "takes FFNs whose norm stands before them and nowhere else, and fold_norms: true, which leaves such norms "
            "without weights of their own"
        )
