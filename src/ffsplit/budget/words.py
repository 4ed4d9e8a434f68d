"""Budgets as people write them: ``keep=0.6``, ``bits=3.2``, ``bytes=80MB``, ``latency=0.7x@tokens=1``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ffsplit.budget.cost import parse_bytes, parse_latency
from ffsplit.errors import RecipeError
from ffsplit.methods.registry import nearest

RANGES: dict[str, tuple[str, float]] = {
    "keep": ("above 0 and at most 1, the share of the FFN parameters that stay", 1.0),
    "bits": ("above 0 and at most 16, the stored bits per FFN weight", 16.0),
    "flops": ("above 0 and at most 1, the share of the FFNs' multiply-accumulates", 1.0),
    "sparsity": ("at least 0 and below 1, the share of work left out at run time", 1.0),
}
KINDS = ("keep", "bits", "bytes", "flops", "latency", "sparsity")
Value = float | str
LOOSE = {"keep": "0.99", "bits": "15.9", "bytes": "1000000GB", "flops": "0.99", "latency": "1x"}
"""Budgets that almost everything meets, for looking at all that could be met."""


class Axis(NamedTuple):
    """A kind of budget, along which a front of damage over cost is looked for.

    Attributes:
        kind: of budget.
        loose: a budget of that kind that almost everything meets.
        budgets: those of that kind that were asked for.
    """

    kind: str
    loose: str
    budgets: tuple[str, ...]


def parse_budget(text: str) -> tuple[str, Value]:
    """``keep=0.6`` as ``("keep", 0.6)``; sizes and latencies stay words, once they are known to be some.

    Raises:
        RecipeError: there is no such kind of budget, or its value is none.
    """
    kind, equals, value = (part.strip() for part in text.partition("="))
    if kind not in KINDS:
        hint = nearest(kind, list(KINDS))
        raise RecipeError(f"budget {text!r}: unknown kind {kind!r}{hint} Known: {', '.join(KINDS)}")
    if not equals or not value:
        raise RecipeError(f"budget {text!r}: write a kind and its value, such as keep=0.6 or bytes=80MB")
    if kind == "bytes":
        size = int(value) if value.isdecimal() else value
        if parse_bytes(size) <= 0:
            raise RecipeError(f"budget {text!r}: a model takes more than no bytes")
        return kind, value if isinstance(size, str) else f"{size}B"
    if kind == "latency":
        parse_latency(value)
        return kind, value
    return kind, _number(text, kind, value)


def parse_axis(budgets: Sequence[str]) -> Axis:
    """The axis of some budgets, one kind at least; a kind without a value names the axis alone.

    Raises:
        RecipeError: they are of several kinds, of none that layers can share, or no budgets.
    """
    asked = list(dict.fromkeys("".join(text.split()) for text in budgets))
    kinds = list(dict.fromkeys(text.partition("=")[0] for text in asked))
    if len(kinds) != 1:
        raise RecipeError(f"a front has one kind of budget, not {' and '.join(kinds) or 'none'}")
    (kind,) = kinds
    if kind in KINDS and kind not in LOOSE:
        raise RecipeError(f"budget {kind}: no front is found for it; known: {', '.join(LOOSE)}")
    loose = f"{kind}={LOOSE.get(kind, '')}"
    given = tuple(text for text in asked if text != kind or kind not in KINDS)
    values = [parse_budget(text)[1] for text in given]
    if kind == "latency" and values:
        tokens = sorted({parse_latency(str(value))[1] for value in values})
        if len(tokens) > 1:
            raise RecipeError(f"a front of latency has one number of tokens, not {' and '.join(map(str, tokens))}")
        loose = f"{loose}@tokens={tokens[0]}"
    return Axis(kind, loose, given)


def _number(text: str, kind: str, value: str) -> float:
    words, most = RANGES[kind]
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (0 <= number < most if kind == "sparsity" else 0 < number <= most):
        raise RecipeError(f"budget {text!r}: {kind} must be {words}")
    return number
