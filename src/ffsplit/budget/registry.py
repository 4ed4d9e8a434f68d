"""The registry of planners: decisions over layers, each of which ends in one method a layer.

A recipe names a planner where it would name a method. Its configuration says what to decide between; the decision is
made on the dense model, from measurements, before the first FFN is fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ffsplit.budget.scene import Scene
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.registry import Budget, Method, MethodConfig, Status, configure, import_room, lookup, methods

Decision = list[MethodConfig | None]
"""The method of every FFN in execution order; None leaves one as it is."""


class PlannerConfig(MethodConfig):
    """Base of every planner's configuration."""

    @property
    def looks_at_attention(self) -> bool:
        """Whether attentions may be left out, besides what happens to FFNs."""
        return False


@dataclass(frozen=True)
class Planner:
    """One way to decide what happens to which FFN.

    Attributes:
        name: what recipes and the command line call it.
        summary: one line of what it does.
        paper: where it comes from.
        budget: which budgets it takes.
        as_sum: what the FFNs become, in the terms of the one idea.
        config: its configuration class.
        check: refuses, from shapes alone, what cannot work (RecipeError, BudgetError).
        decide: the decision.
        example: settings that a configuration needs besides a budget, with some sensible value.
    """

    name: str
    summary: str
    paper: str
    budget: tuple[Budget, ...]
    as_sum: str
    status: Status
    config: type[PlannerConfig]
    check: Callable[[Sequence[FFNShape], Any], None]
    decide: Callable[[Scene, Any], Decision]
    example: Mapping[str, Any] = field(default_factory=dict)


_PLANNERS: dict[str, Planner] = {}


def planner(
    name: str,
    *,
    summary: str,
    paper: str,
    budget: tuple[Budget, ...],
    as_sum: str,
    config: type[PlannerConfig],
    check: Callable[[Sequence[FFNShape], Any], None],
    status: Status = "stable",
    example: Mapping[str, Any] | None = None,
) -> Callable[[Callable[[Scene, Any], Decision]], Callable[[Scene, Any], Decision]]:
    """Register the decorated function ``(scene, config) -> Decision`` as a planner."""

    def register(decide: Callable[[Scene, Any], Decision]) -> Callable[[Scene, Any], Decision]:
        if name in _PLANNERS:
            raise ValueError(f"planner {name} is registered twice")
        _PLANNERS[name] = Planner(name, summary, paper, budget, as_sum, status, config, check, decide, example or {})
        return decide

    return register


def planners() -> dict[str, Planner]:
    """Every planner by name, sorted."""
    import_room("ffsplit.budget")
    return dict(sorted(_PLANNERS.items()))


def entries() -> dict[str, Method | Planner]:
    """Every name that a recipe's ``method`` may have: methods and planners, sorted."""
    return dict(sorted((methods() | planners()).items()))


def get_entry(name: str) -> Method | Planner:
    """A method or planner by name. Raises RecipeError that lists the known ones."""
    return lookup(name, entries())


def entry_config(values: dict[str, Any]) -> MethodConfig:
    """The validated configuration of a method or a planner; see :func:`ffsplit.methods.registry.configure`."""
    return configure(values, entries())
