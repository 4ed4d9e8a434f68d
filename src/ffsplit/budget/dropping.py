"""What planners that drop whole FFNs or attentions share: settings, how many have to go, and the decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ffsplit.budget.registry import Decision, PlannerConfig
from ffsplit.budget.scene import Scene
from ffsplit.errors import BudgetError, RecipeError
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.drop import DropConfig, Replacement
from ffsplit.methods.registry import get_method

Target = Literal["ffn", "attention", "joint"]


class DroppingConfig(PlannerConfig):
    """How many FFNs or attentions go, which may not, and what takes the place of an FFN.

    Attributes:
        target: what may go: every ``ffn``, every self-``attention``, or both in one ranking (``joint``).
        keep: share of the parameters of all FFNs that stay, those of the replacements counted; what is least important
            is dropped until it is reached. Attentions that go on the way are not counted.
        count: how many FFNs or attentions to drop, instead of `keep`.
        replacement: what takes the place of a dropped FFN, as in `drop`: ``nothing``, ``mean``, ``linear`` or
            ``low-rank``.
        rank: of a low-rank replacement.
        ridge: pull of a fitted map to zero.
        protect_first: so many FFNs, and attentions, at the beginning are never dropped.
        protect_last: so many FFNs, and attentions, at the end are never dropped.
        batches: calibration batches to measure on; a replacement is fitted on all of them.
    """

    budget_is_optional: ClassVar[bool] = True
    instead_of_budget: ClassVar[tuple[str, ...]] = ("count",)

    target: Target = "ffn"
    keep: float | None = Field(None, gt=0, lt=1)
    count: int | None = Field(None, ge=1)
    replacement: Replacement = "mean"
    rank: int | None = Field(None, ge=1)
    ridge: float = Field(1e-3, ge=0)
    protect_first: int = Field(0, ge=0)
    protect_last: int = Field(0, ge=0)
    batches: int = Field(8, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> DroppingConfig:
        if (self.keep is None) == (self.count is None):
            raise ValueError("give either keep (share of the FFN parameters that stay) or count (how many to drop)")
        if self.keep is not None and self.target == "attention":
            raise ValueError("keep is a share of FFN parameters, and target='attention' drops none; give count")
        if (self.rank is not None) != (self.replacement == "low-rank"):
            raise ValueError("rank goes with replacement='low-rank', which needs it")
        return self

    @property
    def looks_at_attention(self) -> bool:
        return self.target != "ffn"

    @property
    def drop(self) -> DropConfig:
        """The method of a dropped FFN."""
        return DropConfig(replacement=self.replacement, rank=self.rank, keep=None, ridge=self.ridge)


def droppable(shapes: Sequence[FFNShape], config: DroppingConfig) -> list[int]:
    """The FFNs that may go, in execution order."""
    return list(range(len(shapes)))[config.protect_first : len(shapes) - config.protect_last]


def candidates(scene: Scene, config: DroppingConfig) -> list[int]:
    """What may go, by its place in ``scene.sub_layers``.

    Raises:
        RecipeError: fewer than the count, or nothing.
    """
    ffns = [] if config.target == "attention" else droppable(scene.shapes, config)
    places = range(len(scene.shapes), len(scene.sub_layers))
    attentions = list(places)[config.protect_first : len(places) - config.protect_last]
    free = [*ffns, *attentions]
    if len(free) < (config.count or 1):
        raise RecipeError(
            f"count={config.count}: only {len(free)} of {len(scene.sub_layers)} FFNs and attentions may be dropped "
            f"(target={config.target!r}, protect_first={config.protect_first}, protect_last={config.protect_last})"
        )
    return free


def savings(shapes: Sequence[FFNShape], config: DroppingConfig) -> list[int]:
    """Parameters that dropping each FFN saves, its replacement counted."""
    method = get_method("drop")
    return [shape.parameters - method.plan(shape, config.drop).parameters for shape in shapes]


def excess(shapes: Sequence[FFNShape], config: DroppingConfig, dropped: Sequence[int]) -> float:
    """How much is still to be dropped: FFN parameters above the budget, or drops below the count; at most 0 when done.

    Places in ``dropped`` beyond the FFNs are attentions.
    """
    if config.count is not None:
        return config.count - len(dropped)
    assert config.keep is not None
    saved, total = savings(shapes, config), sum(shape.parameters for shape in shapes)
    return total - sum(saved[index] for index in dropped if index < len(shapes)) - config.keep * total


def check_dropping(shapes: Sequence[FFNShape], config: DroppingConfig) -> None:
    """Refuse what cannot be reached by dropping FFNs; how many attentions there are is not known from shapes.

    Raises:
        RecipeError: no FFN may be dropped, fewer than the count, or the replacement is larger than an FFN.
        BudgetError: not even all FFNs that may go bring the parameters down to the budget.
    """
    if config.target == "attention":
        return
    free, saved = droppable(shapes, config), savings(shapes, config)
    if not free:
        raise RecipeError(
            f"protect_first={config.protect_first} and protect_last={config.protect_last} leave none of the "
            f"{len(shapes)} FFNs to drop"
        )
    if min(saved[index] for index in free) <= 0:
        raise RecipeError(f"replacement={config.replacement!r} is no smaller than an FFN of this model")
    if config.target == "ffn" and config.count is not None and config.count > len(free):
        raise RecipeError(f"count={config.count}: only {len(free)} of the {len(shapes)} FFNs may be dropped")
    if config.keep is not None and excess(shapes, config, free) > 0:
        total = sum(shape.parameters for shape in shapes)
        smallest = 1 - sum(saved[index] for index in free) / total
        raise BudgetError(
            f"keep={config.keep} is out of reach when {len(free)} of {len(shapes)} FFNs may be dropped; the smallest "
            f"reachable keep is {smallest:.4f}"
        )


def least_important(shapes: Sequence[FFNShape], config: DroppingConfig, scores: Mapping[int, float]) -> list[int]:
    """What has the lowest scores, one after the other until the budget is met; of equal ones the earlier first.

    Places beyond the FFNs are attentions.
    """
    free = {*droppable(shapes, config), *(index for index in scores if index >= len(shapes))} & scores.keys()
    dropped: list[int] = []
    for index in sorted(free, key=lambda index: (scores[index], index)):
        if excess(shapes, config, dropped) <= 0:
            break
        dropped.append(index)
    return dropped


def decided(scene: Scene, dropped: Sequence[int], scores: Mapping[int, float], config: DroppingConfig) -> Decision:
    """The dropped FFNs get their replacement, the others stay; the scene learns which attentions go.

    What goes, in the order of the decision, and what was measured of which is left for the report.
    """
    count, names = len(scene.shapes), [site.name for site in scene.sub_layers]
    scene.left_out[:] = sorted(index - count for index in dropped if index >= count)
    scene.notes["dropped"] = [names[index] for index in dropped]
    scene.notes["scores"] = {names[index]: value for index, value in scores.items()}
    return [config.drop if index in dropped else None for index in range(count)]
