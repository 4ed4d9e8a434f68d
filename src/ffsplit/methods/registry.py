"""The registry of methods. The command line, the recipe schema, the tests and the docs follow from it."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args, runtime_checkable

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import RecipeError
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN, dense_branch
from ffsplit.methods.budgets import dense_branch_spec, sum_spec
from ffsplit.methods.neurons import GRADIENT_SCORES

Status = Literal["stable", "experimental"]
Budget = Literal["keep", "bits", "sparsity"]
EXAMPLE_BUDGETS: dict[Budget, float] = {"keep": 0.5, "bits": 4.0, "sparsity": 0.5}
"""A middling value of each kind of budget, for lists and pages that need some configuration of every method."""


class MethodConfig(BaseModel):
    """Base of every method's configuration: frozen, and an unknown key is an error.

    A budget is ``keep`` (share of the FFN's parameters that stay), ``bits`` (average stored bits per dense FFN weight,
    with scales, zeros and biases counted) or ``sparsity`` (share of the activations, or of the tokens, that are left
    out at run time); which of them a method takes is its own matter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    budget_is_optional: ClassVar[bool] = False
    """Whether the method has a meaning without any budget."""
    instead_of_budget: ClassVar[tuple[str, ...]] = ()
    """Settings that say in another unit what a budget says, so that a budget replaces them."""
    method: str

    @property
    def needs_data(self) -> bool:
        """Whether fitting looks at calibration inputs."""
        return True

    @property
    def needs_gradients(self) -> bool:
        """Whether fitting looks at gradients of the dense model's loss, which are taken before any FFN is replaced."""
        return getattr(self, "score", None) in GRADIENT_SCORES and not self.full_budget

    @property
    def full_budget(self) -> bool:
        """Whether the budget leaves the FFN as it is."""
        return False

    @property
    def imitates(self) -> bool:
        """Whether the result shall compute what the dense FFN in its place does, so that the difference is an error."""
        return True

    def quick(self) -> MethodConfig:
        """A cheaper variant that does about the same damage, for comparing candidates."""
        return self


class KeepConfig(MethodConfig):
    """A method whose budget is a share of parameters; at 1 the FFN stays as it is."""

    keep: float

    @property
    def full_budget(self) -> bool:
        return self.keep == 1

    @model_validator(mode="after")
    def _keep_in_range(self) -> KeepConfig:
        check_keep(self.keep)
        return self


def check_keep(keep: float) -> None:
    """Raise ValueError when a share of parameters is out of range."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1 (share of FFN parameters that stay), not {keep}")


class SparsityConfig(MethodConfig):
    """A method whose budget is the share of work left out at run time; at 0 the FFN stays as it is."""

    sparsity: float

    @property
    def full_budget(self) -> bool:
        return self.sparsity == 0

    @model_validator(mode="after")
    def _sparsity_in_range(self) -> SparsityConfig:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be at least 0 and below 1 (share that is left out), not {self.sparsity}")
        return self


@dataclass(frozen=True)
class Method:
    """One way to compress an FFN.

    Attributes:
        name: what recipes and the command line call it.
        summary: one line of what it does.
        paper: where it comes from.
        budget: which budgets it takes.
        as_sum: the method in the terms of the one idea, a sum of branches.
        config: its configuration class.
        example: settings that a configuration needs besides a budget, with some sensible value.
        structure: the structure it will produce for an FFN of a given shape, before any data is seen.
        fit: the compressed FFN, with exactly that structure.
        alone: whether a recipe may name it; False for a step that only a planner's decision consists of.
    """

    name: str
    summary: str
    paper: str
    budget: tuple[Budget, ...]
    as_sum: str
    status: Status
    config: type[MethodConfig]
    structure: Callable[[FFNShape, Any], SumSpec]
    fit: Callable[[LayerData, Any], SumFFN]
    example: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = True

    def plan(self, shape: FFNShape, config: MethodConfig) -> SumSpec:
        """The structure that :meth:`apply` will produce for an FFN of this shape. Needs no data.

        Raises:
            BudgetError: the budget cannot be reached; the message says the smallest that can.
        """
        if config.full_budget:
            return sum_spec(shape, [dense_branch_spec(shape, shape.d_ff)], bias=shape.down_bias)
        return self.structure(shape, config)

    def apply(self, data: LayerData, config: MethodConfig) -> SumFFN:
        """The compressed FFN. A full budget is the dense FFN itself, whatever the method."""
        if config.full_budget:
            return SumFFN(data.ffn.d_model, [dense_branch(data.ffn)], bias=data.ffn.down_bias)
        return self.fit(data, config)


_METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    summary: str,
    paper: str,
    budget: tuple[Budget, ...],
    as_sum: str,
    config: type[MethodConfig],
    structure: Callable[[FFNShape, Any], SumSpec],
    status: Status = "stable",
    example: Mapping[str, Any] | None = None,
    alone: bool = True,
) -> Callable[[Callable[[LayerData, Any], SumFFN]], Callable[[LayerData, Any], SumFFN]]:
    """Register the decorated function ``(data, config) -> SumFFN`` as a method."""

    def register(fit: Callable[[LayerData, Any], SumFFN]) -> Callable[[LayerData, Any], SumFFN]:
        if name in _METHODS:
            raise ValueError(f"method {name} is registered twice")
        extra = example or {}
        _METHODS[name] = Method(name, summary, paper, budget, as_sum, status, config, structure, fit, extra, alone)
        return fit

    return register


@cache
def import_room(name: str) -> None:
    """Import every module of a room, ``ffsplit.methods`` or another one, so that its decorators have registered all."""
    for module in pkgutil.iter_modules(importlib.import_module(name).__path__):
        importlib.import_module(f"{name}.{module.name}")


def methods() -> dict[str, Method]:
    """Every method that a recipe may name, by name, sorted."""
    return {name: found for name, found in all_methods().items() if found.alone}


def all_methods() -> dict[str, Method]:
    """Those of :func:`methods`, and the steps that planners decide on."""
    import_room("ffsplit.methods")
    return dict(sorted(_METHODS.items()))


def nearest(word: str, known: list[str]) -> str:
    """The end of a sentence: a hint that names the closest known word, or a full stop."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."


@runtime_checkable
class Entry(Protocol):
    """What methods and planners have in common for a lookup by name."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> type[MethodConfig]: ...


E = TypeVar("E", bound=Entry)


def lookup(name: str, known: Mapping[str, E]) -> E:
    """An entry by name. Raises RecipeError that lists the known ones."""
    if name not in known:
        raise RecipeError(f"unknown method {name!r}{nearest(name, list(known))} Known: {', '.join(known)}")
    return known[name]


def configure(values: dict[str, Any], known: Mapping[str, Entry]) -> MethodConfig:
    """Validate a configuration given as plain values with a ``method`` key.

    Raises:
        RecipeError: unknown method or field (with the nearest known one), or a value out of range.
    """
    if "method" not in values:
        raise RecipeError(f"a method block needs a 'method' key; known: {', '.join(known)}")
    chosen = lookup(str(values["method"]), known)
    try:
        return chosen.config.model_validate(values)
    except ValidationError as error:
        raise RecipeError(explain(error, chosen.config, f"method {chosen.name}")) from error


def get_method(name: str) -> Method:
    """A method by name. Raises RecipeError that lists the known ones."""
    return lookup(name, all_methods())


def method_config(values: dict[str, Any]) -> MethodConfig:
    """The validated configuration of a method, of a planner's step too; see :func:`configure`."""
    return configure(values, all_methods())


def explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """A pydantic error as one readable sentence a problem."""
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            *parents, last = map(str, problem["loc"])
            known = list(_inner(model, parents).model_fields)
            lines.append(f"unknown key {field!r}{nearest(last, known)} Allowed: {', '.join(known)}")
        elif problem["type"] == "missing":
            lines.append(f"{field} is required")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{field}: {message} (got {problem['input']!r})" if field else message)
    return f"{where}: " + "; ".join(lines)


def _inner(model: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """The model that a path of field names (and list indices, which are skipped) leads to."""
    for name in path:
        if name in model.model_fields:
            annotation = model.model_fields[name].annotation
            inside = [part for part in (annotation, *get_args(annotation)) if isinstance(part, type)]
            model = next((part for part in inside if issubclass(part, BaseModel)), model)
    return model
