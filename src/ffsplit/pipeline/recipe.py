"""A recipe: what to do to which FFN, on which text. One schema for YAML files, Python and the command line."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator

from ffsplit.budget.registry import Decision, PlannerConfig, entries, entry_config, get_entry
from ffsplit.budget.words import parse_budget
from ffsplit.errors import RecipeError
from ffsplit.methods.registry import MethodConfig, explain, nearest
from ffsplit.recover.config import Recovery

DEFAULT_BITS = 4.0
BUDGETS = {
    "keep": "share of FFN parameters that stay, 0 to 1",
    "bits": "stored bits per FFN weight",
    "sparsity": "share of activations or tokens left out at run time, 0 to 1",
}
WHOLE_MODEL = ("bytes", "flops", "latency")
BUDGET_FIELDS = frozenset({*BUDGETS, *WHOLE_MODEL})
ALL_NEURONS: dict[str, Any] = {"method": {"method": "prune", "keep": 1.0, "score": "magnitude", "refit": False}}
"""What masks start from: sums that are the dense FFNs."""
DEFAULT_DOCUMENTS = 1024
"""Calibration sequences of a model that reads documents, unless a number is asked for: these are short,
and a fit over thousands of neurons needs tens of thousands of tokens."""

PRESETS: dict[str, dict[str, Any]] = {
    "ffsplit-paper-lowrank": {
        "method": {
            "method": "ffsplit",
            "rest": "svd",
            "heavy": 0.1,
            "score": "output_norm",
            "refit": False,
            "keep": 0.75,
        }
    },
    "ffsplit-paper-quant": {
        "method": {"method": "ffsplit", "rest": "rtn", "rest_bits": 3, "heavy": 0.03, "refit": False, "bits": 4.0}
    },
    "ffsplit-best": {"method": {"method": "ffsplit"}, "drift": 0.5},
    "prune-best": {"method": {"method": "prune"}, "drift": 0.5},
}
"""Recipes with names of their own, beside those of the methods: the paper's two as published, and the ones that
measured best, which take about twice as long because they follow the dense model too."""


def _method(value: object) -> object:
    if isinstance(value, MethodConfig):
        return value
    if isinstance(value, str):
        value = {"method": value}
    if not isinstance(value, dict):
        raise ValueError("a method is a name or a mapping with a 'method' key")
    try:
        return entry_config(value)
    except RecipeError as error:
        raise ValueError(str(error)) from error


MethodField = Annotated[SerializeAsAny[MethodConfig], BeforeValidator(_method)]


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Calibration(_Block):
    """The text that statistics are taken on.

    Attributes:
        source: ``builtin``, a file, a folder, or a dataset id.
        field: column of a structured source.
        samples: windows used; documents for encoders, 1,024 of them unless this is given.
        seq_len: tokens per window.
        batch_size: windows per forward pass.
    """

    source: str = "builtin"
    field: str | None = None
    samples: int = Field(default=48, ge=1)
    seq_len: int = Field(default=2048, ge=2)
    batch_size: int = Field(default=1, ge=1)


class Override(_Block):
    """Another method (or None: leave them) for some of the FFNs, by index in execution order: ``0-3,29`` or ``-1``."""

    ffns: str
    method: MethodField | None

    @field_validator("ffns", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, int) else value

    @field_validator("method")
    @classmethod
    def _no_planner(cls, value: MethodConfig | None) -> MethodConfig | None:
        if isinstance(value, PlannerConfig):
            raise ValueError(f"{value.method} decides over all FFNs; an override takes a method for one FFN")
        return value


class Recipe(_Block):
    """Everything that determines a compression, beside the model.

    Attributes:
        method: for every FFN that no override names; or a planner, which decides on a method for each.
        overrides: the last one that names an FFN wins.
        calibration: text and amount.
        propagate: fit each layer on the inputs that the already compressed ones give it.
        fold_norms: first fold the weights of the norms in front of the FFNs into what they feed: no output changes, but
            the weights and inputs that methods see do.
        centre_norms: then take out of every FFN's ``down`` what LayerNorms subtract anyway, the mean over d_model: no
            output of the model changes, but those of its FFNs do.
        drift: share, 0 to 1, of the residual stream's drift from the dense model that each refit also tries to repair;
            at 0 a compressed FFN only imitates its dense one on the inputs that it gets.
        seed: of everything random.
        recovery: train what was fitted, with the dense model as the teacher; None does not.
    """

    version: Literal[1] = 1
    method: MethodField
    overrides: tuple[Override, ...] = ()
    calibration: Calibration = Calibration()
    propagate: bool = True
    fold_norms: bool = False
    centre_norms: bool = False
    drift: float = Field(0.0, ge=0, le=1)
    seed: int = Field(0, ge=0, lt=2**32)
    recovery: Recovery | None = None

    @property
    def unlike_dense(self) -> str | None:
        """Why the FFNs cannot be compared with those of the dense model one by one; None if they can be."""
        if self.fold_norms:
            return "the norms in front of these FFNs were folded into them (fold_norms)"
        if self.centre_norms:
            return "the outputs of these FFNs were centred (centre_norms)"
        if self.planner is not None and self.planner.method == "ffn-fusion":
            return "some of these FFNs hold the neurons of several (ffn-fusion)"
        return None

    @property
    def planner(self) -> PlannerConfig | None:
        """What decides over the FFNs, or None when every FFN gets the same method."""
        return self.method if isinstance(self.method, PlannerConfig) else None

    def methods_for(self, count: int, decided: Decision | None = None) -> Decision:
        """The method of each of ``count`` FFNs in execution order; None leaves an FFN as it is.

        Args:
            count: FFNs of the model.
            decided: by the planner, if there is one; overrides win over it too.
        """
        chosen: Decision = [self.method] * count if decided is None else list(decided)
        for index, method in self.overridden(count).items():
            chosen[index] = method
        return chosen

    def overridden(self, count: int) -> dict[int, MethodConfig | None]:
        """What overrides say of some of ``count`` FFNs, by their place in the execution order."""
        return {index: override.method for override in self.overrides for index in parse_indices(override.ffns, count)}


def parse_indices(text: str, count: int) -> list[int]:
    """Indices such as ``0-3,7,-1`` among ``count``.

    Raises:
        RecipeError: not a list of indices, or one out of range.
    """
    indices: list[int] = []
    for part in text.replace(" ", "").split(","):
        first, dash, last = part.partition("-") if not part.startswith("-") else (part, "", "")
        try:
            start = int(first)
            stop = int(last) if dash else start
        except ValueError:
            raise RecipeError(f"ffns={text!r}: {part!r} is neither an index nor a range like 0-3") from None
        if stop < start:
            raise RecipeError(f"ffns={text!r}: the range {part!r} is empty; write the smaller index first")
        if dash and stop < count:
            indices.extend(range(start, stop + 1))
        elif dash:
            indices.append(stop)  # out of range, which is said below; the range may be too long to write out
        else:
            indices.append(start)
    for index in indices:
        if not -count <= index < count:
            raise RecipeError(
                f"ffns={text!r}: index {index} is out of range; the model has {count} FFNs (0 to {count - 1})"
            )
    return [index % count for index in indices]


def load_recipe(
    recipe: str | Path | dict[str, Any] | Recipe | None = None,
    *,
    keep: float | None = None,
    bits: float | None = None,
    sparsity: float | None = None,
    budget: str | None = None,
    methods: Sequence[str] = (),
    calibration: dict[str, Any] | None = None,
    seed: int | None = None,
    fold_norms: bool | None = None,
    centre_norms: bool | None = None,
) -> Recipe:
    """A recipe from a method's name, a preset's name, a YAML file or plain values, with the caller's values on top.

    Args:
        recipe: where to start from; None means `auto` if ``budget`` or ``methods`` are given, else `ffsplit`.
        keep: budget, share of FFN parameters that stay; replaces the recipe's.
        bits: budget, stored bits per FFN weight; replaces the recipe's.
        sparsity: budget, share of activations or tokens left out at run time; replaces the recipe's.
        budget: any kind of budget as words, such as ``keep=0.6`` or ``latency=0.7x@tokens=1``; replaces the recipe's.
        methods: names that `auto` chooses from; replace the recipe's.
        calibration: fields of :class:`Calibration` that replace the recipe's.
        seed: replaces the recipe's.
        fold_norms: replaces the recipe's.
        centre_norms: replaces the recipe's.

    Raises:
        RecipeError: unknown name, key or value; or a budget that the method does not take.
    """
    if recipe is None:
        recipe = "auto" if budget is not None or methods else "ffsplit"
    values = _start(recipe)
    method = values.get("method")
    if isinstance(method, str):
        method = {"method": method}
    if isinstance(method, dict):
        asked: dict[str, float | str | None] = {"keep": keep, "bits": bits, "sparsity": sparsity}
        values["method"] = _with_budget(_with_methods(method, methods), _one_budget(asked, budget))
    if calibration:
        stated = values.get("calibration") or {}
        if not isinstance(stated, dict):
            raise RecipeError(f"recipe: calibration must be a mapping such as {{source: builtin}}, not {stated!r}")
        values["calibration"] = {**stated, **calibration}
    replaced = {"seed": seed, "fold_norms": fold_norms, "centre_norms": centre_norms}
    values |= {name: value for name, value in replaced.items() if value is not None}
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, "recipe")) from error


def method_named(recipe: str) -> str | None:
    """The method that a recipe's name or file leads to, before its values are looked at; None if there is none.

    Raises:
        RecipeError: there is no such recipe.
    """
    method = _start(recipe).get("method")
    found = method.get("method") if isinstance(method, dict) else method
    return None if found is None else str(found)


def _start(recipe: str | Path | dict[str, Any] | Recipe) -> dict[str, Any]:
    """The plain values of a recipe, wherever it comes from."""
    if isinstance(recipe, Recipe):
        # A default that nobody asked for stays one: the window length then gives way to what the model can take.
        asked = recipe.calibration.model_dump(mode="json", exclude_unset=True)
        return {**recipe.model_dump(mode="json"), "calibration": asked}
    return dict(recipe) if isinstance(recipe, dict) else _named_or_file(str(recipe))


def _one_budget(asked: Mapping[str, float | str | None], words: str | None) -> dict[str, float | str]:
    """The budget that the caller gave in one way or another, if any.

    Raises:
        RecipeError: there are several, or the words are none.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) > 1:
        raise RecipeError(f"give one budget, {' or '.join(given)}, not both")
    if words is None:
        return given
    if given:
        raise RecipeError(f"give one budget, {next(iter(given))} or budget={words!r}, not both")
    kind, value = parse_budget(words)
    return {kind: value}


def _with_methods(method: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The method's values with what it shall choose from."""
    if not names:
        return dict(method)
    chosen = get_entry(str(method.get("method")))
    if "methods" not in chosen.config.model_fields:
        raise RecipeError(f"method {chosen.name} does not choose from methods; auto does")
    return {**method, "methods": list(names)}


def _with_budget(method: dict[str, Any], given: Mapping[str, float | str]) -> dict[str, Any]:
    """The method's values with the caller's budget in place of its own, or with the default if there is none."""
    chosen = get_entry(str(method.get("method")))
    # Budgets of a whole model, such as bytes, are fields of planners that know what these cost.
    takes = [*chosen.budget, *(kind for kind in WHOLE_MODEL if kind in chosen.config.model_fields)]
    said = BUDGET_FIELDS.union(chosen.config.instead_of_budget)
    for name, value in given.items():
        if name not in takes:
            its = f"its budget is {' or '.join(takes)}" if takes else "it has no budget"
            raise RecipeError(f"method {chosen.name} takes no {name}; {its}")
        method = {key: old for key, old in method.items() if key not in said} | {name: value}
    if chosen.budget and not chosen.config.budget_is_optional and not said & method.keys():
        if "bits" not in chosen.budget:
            needed = " or ".join(f"{name} ({BUDGETS[name]})" for name in chosen.budget)
            raise RecipeError(f"method {chosen.name} needs a budget: {needed}")
        method["bits"] = DEFAULT_BITS
    return method


def _named_or_file(name: str) -> dict[str, Any]:
    if name in entries():
        return {"method": {"method": name}}
    if name in PRESETS:
        return copy.deepcopy(PRESETS[name])
    path = Path(name)
    if path.suffix not in {".yaml", ".yml", ".json"}:
        known = [*entries(), *PRESETS]
        raise RecipeError(f"unknown recipe {name!r}{nearest(name, known)} Known: {', '.join(known)}; or a .yaml file")
    if not path.is_file():
        raise RecipeError(f"recipe file {name} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"recipe file {name} is not valid YAML: {error}") from error
    except OSError as error:
        raise RecipeError(f"recipe file {name} cannot be read: {error.strerror or error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe file {name} must hold a mapping with a 'method' key")
    return values
