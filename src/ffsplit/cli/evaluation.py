"""What ``eval`` and ``demo`` print: a model beside its dense one, and the protocol."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ffsplit.cli.tables import line, show, size

if TYPE_CHECKING:
    from ffsplit.evaluate.evaluate import Evaluation

Files = dict[str, int] | None
_QUALITY = (
    ("perplexity", "value", "{:.3f}"),
    ("nats per token", "nll", "{:.4f}"),
    ("masked-LM accuracy", "accuracy", "{:.2%}"),
    ("cross-entropy (nats)", "cross_entropy", "{:.4f}"),
)
_DISTANCE = (
    ("agreement", "KL to dense (nats per token)", "kl", "{:.5f}"),
    ("agreement", "KL, 99th percentile of tokens", "kl_p99", "{:.4f}"),
    ("agreement", "top-1 agreement with dense", "top1", "{:.2%}"),
    ("hidden", "cosine of hidden states to dense", "cosine", "{:.5f}"),
    ("hidden", "relative error of hidden states", "relative_error", "{:.5f}"),
)


def show_evaluation(evaluation: Evaluation, disk: Files = None, dense_disk: Files = None) -> None:
    """Print a table and the protocol below it.

    Args:
        evaluation: what was measured.
        disk: bytes of the model's files, if it has any here.
        dense_disk: the same of the dense model.
    """
    alone = evaluation.dense_size is None
    rows = [*_quality(evaluation.to_dict()), *_sizes(evaluation, disk, dense_disk)]
    columns = ("", "this model") if alone else ("", "dense", "this model")
    picked = [(name, new) if alone else (name, old, new) for name, old, new in rows]
    show(f"Evaluation of {'an' if evaluation.kind[0] in 'aeiou' else 'a'} {evaluation.kind} model", columns, picked)
    for part in (evaluation.quality, evaluation.hidden):
        if part is not None:
            line(part.describe())


def _quality(found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    new, old = found["quality"] or {}, found["dense"] or {}
    for label, key, form in _QUALITY:
        if key in new:
            yield label, _number(old.get(key), form) if old else "", _number(new[key], form)
    for part, label, key, form in _DISTANCE:
        if found[part] is not None:
            yield label, "", _number(found[part][key], form)


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else form.format(value)


def _sizes(evaluation: Evaluation, disk: Files, dense_disk: Files) -> Iterator[tuple[str, str, str]]:
    new, old = evaluation.size, evaluation.dense_size
    yield "in memory", "" if old is None else size(old.bytes_in_memory), size(new.bytes_in_memory)
    for label, key in (("on disk, weights", "weights"), ("on disk, all files", "all")):
        if disk or dense_disk:
            yield label, size(dense_disk[key]) if dense_disk else "", size(disk[key]) if disk else ""
