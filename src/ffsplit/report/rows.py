"""One checkpoint's figures as a plain dict: what tables, plots and JSON are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ffsplit.bench.latency import Timing
from ffsplit.evaluate.evaluate import Evaluation
from ffsplit.evaluate.masked_lm import MaskedLM
from ffsplit.evaluate.perplexity import Perplexity
from ffsplit.report.facts import CheckpointFacts
from ffsplit.report.pareto import pareto_front


def row_of(facts: CheckpointFacts, evaluation: Evaluation, timing: Timing | None) -> dict[str, Any]:
    """The row of a checkpoint that was held against the reference."""
    row = _row(facts, evaluation.quality, evaluation.size.bytes_in_memory, timing)
    if evaluation.agreement is not None:
        row |= {"kl": evaluation.agreement.kl, "top1": evaluation.agreement.top1}
    if evaluation.hidden is not None:
        row |= {"cosine": evaluation.hidden.cosine}
    return row


def reference_row(facts: CheckpointFacts, evaluation: Evaluation, timing: Timing | None) -> dict[str, Any]:
    """The row of the reference, from the evaluation of a checkpoint that was held against it."""
    assert evaluation.dense_size is not None
    row = _row(facts, evaluation.dense, evaluation.dense_size.bytes_in_memory, timing)
    return row if evaluation.hidden is None else row | {"cosine": 1.0}


def mark_front(rows: Sequence[dict[str, Any]]) -> None:
    """Set ``on_front`` of every row: fewest bytes in memory, best quality."""
    points = [(float(row["bytes_memory"]), loss(row)) for row in rows]
    for row, on_front in zip(rows, pareto_front(points), strict=True):
        row["on_front"] = on_front


def loss(row: Mapping[str, Any]) -> float:
    """What a row's quality comes to when less is better."""
    if row["perplexity"] is not None:
        return float(row["perplexity"])
    if row["accuracy"] is not None:
        return 1.0 - float(row["accuracy"])
    return math.nan if row["cosine"] is None else 1.0 - float(row["cosine"])


def _row(
    facts: CheckpointFacts, quality: Perplexity | MaskedLM | None, bytes_memory: int, timing: Timing | None
) -> dict[str, Any]:
    return {
        "name": facts.name,
        "kind": facts.kind,
        "method": facts.methods,
        **facts.budget,
        "bytes_disk": facts.bytes_disk,
        "bytes_memory": bytes_memory,
        "perplexity": quality.value if isinstance(quality, Perplexity) else None,
        "accuracy": quality.accuracy if isinstance(quality, MaskedLM) else None,
        "cosine": None,
        "kl": None,
        "top1": None,
        "prefill_seconds": None if timing is None else timing.prefill_seconds,
        "decode_seconds": None if timing is None else timing.decode_seconds,
        "prefill_speed": None if timing is None else timing.prefill_speed,
        "decode_speed": None if timing is None else timing.decode_speed,
        "on_front": False,
    }
