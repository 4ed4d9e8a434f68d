"""What `auto` decided, for people: the choice of every layer, and the plans that were compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from ffsplit.cli.tables import line, show

_KINDS = {"allocation": "layer by layer", "uniform": "all layers alike"}
Method = Mapping[str, Any] | None


def show_allocation(allocation: Mapping[str, Any]) -> None:
    """Both tables of a decision, as it lies in a report."""
    show(
        "Plan by layer, with the damage that each choice does alone",
        ("FFNs", "choice", "predicted damage"),
        list(_folded(allocation["layers"])),
        words=2,
    )
    show(
        "Plans, each with the damage of its layers added up and, if carried out, as it was",
        ("plan", "cost", "predicted damage", "measured damage"),
        [_plan(plan) for plan in allocation["plans"]],
        words=2,
    )
    if len(allocation["plans"]) > 1:
        line(f"Saved: the plan {_KINDS[allocation['chosen']]}, which did the least damage.")


def in_words(method: Method) -> str:
    """A method with the settings that are not its defaults."""
    if method is None:
        return "as it is"
    from ffsplit.methods.registry import method_config

    settings = method_config(dict(method)).model_dump(mode="json", exclude_defaults=True)
    return " ".join([method["method"], *(f"{k}={_value(v)}" for k, v in settings.items() if k != "method")])


def damage(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "+".join(f"{count}x{key}" for key, count in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plan(plan: Mapping[str, Any]) -> tuple[str, ...]:
    return _KINDS[plan["plan"]], plan["cost"], damage(plan["predicted_damage"]), damage(plan["measured_damage"])


def _folded(layers: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Neighbours with the same choice in one row, their damages added up."""
    for choice, run in groupby(layers, key=lambda layer: in_words(layer["method"])):
        same = list(run)
        names = same[0]["ffn"] if len(same) == 1 else f"{same[0]['ffn']} ... {same[-1]['ffn']}"
        yield names, choice, damage(sum(layer["damage"] for layer in same))
