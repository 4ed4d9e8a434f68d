"""Budgets as people write them: ``keep=0.6``, ``bits=3.2``, ``bytes=80MB``, ``latency=0.7x@tokens=1``."""

from __future__ import annotations

import math

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


def _number(text: str, kind: str, value: str) -> float:
    words, most = RANGES[kind]
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (0 <= number < most if kind == "sparsity" else 0 < number <= most):
        raise RecipeError(f"budget {text!r}: {kind} must be {words}")
    return number
