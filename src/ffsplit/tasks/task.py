"""The nine tasks of GLUE and any other one with named columns: what is read, predicted and reported."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Literal

from ffsplit.errors import DataError

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]


@dataclass(frozen=True)
class Task:
    """One classification or regression of a text or a pair of texts.

    Attributes:
        name: as on the command line.
        columns: names of (first text, second text or None, label), in the order in which they are looked for; numbers
            are columns, from 0, of a file without a header.
        classes: names of the labels in the order of their numbers; empty where the training part tells.
        regression: the label is a number to predict.
        metrics: what is reported; the first one decides which weights are best.
        report: name of the part of the hub's dataset with public labels that is reported on.
    """

    name: str
    columns: tuple[tuple[str, str | None, str], ...]
    metrics: tuple[Metric, ...] = ("accuracy",)
    classes: tuple[str, ...] = ()
    regression: bool = False
    report: str = "validation"


_YES_NO = ("not_entailment", "entailment")[::-1]
_PAIR = ("sentence1", "sentence2", "label")

# Columns: those of the hub's dataset first, then those of the files that the benchmark itself gives out.
GLUE: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", (("sentence", None, "label"), ("3", None, "1")), ("matthews",)),
        Task("sst2", (("sentence", None, "label"),)),
        Task("mrpc", (_PAIR, ("#1 String", "#2 String", "Quality")), ("accuracy", "f1")),
        Task(
            "stsb",
            (_PAIR, ("sentence1", "sentence2", "score"), ("5", "6", "4")),
            ("spearman", "pearson"),
            regression=True,
        ),
        Task("qqp", (("question1", "question2", "label"), ("question1", "question2", "is_duplicate")),
             ("accuracy", "f1")),
        Task("mnli", (("premise", "hypothesis", "label"), ("sentence1", "sentence2", "gold_label")),
             classes=("entailment", "neutral", "contradiction"), report="validation_matched"),
        Task("qnli", (("question", "sentence", "label"),), classes=_YES_NO),
        Task("rte", (_PAIR,), classes=_YES_NO),
        Task("wnli", (_PAIR,)),
    )
}  # fmt: skip


def task_of(name: str | None, columns: str | None, *, regression: bool = False) -> Task:
    """A task of GLUE by name, or another one from its columns.

    Args:
        name: of the task; free to choose when there are columns.
        columns: ``text,label`` or ``text_a,text_b,label``; replaces those of the named task.
        regression: the label is a number, for a task that GLUE does not have.

    Raises:
        DataError: no such task, or the columns are not two or three names.
    """
    known = GLUE.get(name) if name is not None else None
    if columns is None:
        if known is None:
            close = difflib.get_close_matches(name or "", GLUE, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise DataError(
                f"--task {name!r}: must be one of {', '.join(GLUE)}, or any name together with "
                f"--columns text_a,text_b,label{hint}"
            )
        return known
    names = [part.strip() for part in columns.split(",")]
    if len(names) not in (2, 3) or not all(names):
        raise DataError(f"--columns {columns!r}: give text,label or text_a,text_b,label")
    chosen = (names[0], names[1] if len(names) == 3 else None, names[-1])
    if known is not None:
        return replace(known, columns=(chosen,))
    metrics: tuple[Metric, ...] = ("spearman", "pearson") if regression else ("accuracy",)
    return Task(name or "custom", (chosen,), metrics, regression=regression)
