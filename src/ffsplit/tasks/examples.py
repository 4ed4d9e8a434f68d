"""Rows -> examples: texts and labels as numbers, with a hash of exactly what was read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ffsplit.errors import DataError
from ffsplit.tasks.parts import Part, Parts
from ffsplit.tasks.task import Task

HELD_OUT, MOST_HELD_OUT = 0.1, 2000


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts with their labels.

    Attributes:
        first: the text, or the first of a pair.
        second: the other text of each pair; None for a task of single texts.
        labels: ``[examples]``, int64 class numbers, or float32 values of a regression.
        name: where they come from.
    """

    first: tuple[str, ...]
    second: tuple[str, ...] | None
    labels: np.ndarray
    name: str

    def __len__(self) -> int:
        return len(self.first)

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(self.labels.tobytes())
        for text in (*self.first, *(self.second or ())):
            content = text.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()

    def take(self, rows: np.ndarray, name: str) -> Examples:
        """Some of the examples, under another name."""
        second = None if self.second is None else tuple(self.second[row] for row in rows)
        return Examples(tuple(self.first[row] for row in rows), second, self.labels[rows], name)


@dataclass(frozen=True, eq=False)
class TaskData:
    """All parts of a task, read.

    Attributes:
        classes: names of the labels, in the order of their numbers; empty for a regression.
    """

    task: Task
    train: Examples
    select: Examples
    report: Examples
    classes: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """Outputs of the head."""
        return max(len(self.classes), 1)

    def describe(self) -> dict[str, Any]:
        """What a result says about the data."""
        parts = {"train": self.train, "select": self.select, "report": self.report}
        return {
            name: {"source": part.name, "examples": len(part), "sha256": part.sha256} for name, part in parts.items()
        }


def read_task(task: Task, parts: Parts, limit: int | None = None) -> TaskData:
    """Read the parts.

    Args:
        task: which columns and labels.
        parts: where they lie.
        limit: train on so many examples, drawn at random once for all seeds; None takes all.

    Raises:
        DataError: a text or label is missing or of the wrong kind, or there are fewer than two classes.
    """
    raw = {name: _read(task, part) for name, part in (("train", parts.train), ("report", parts.report))}
    raw |= {} if parts.select is None else {"select": _read(task, parts.select)}
    classes = () if task.regression else task.classes or _classes(raw["train"][2], parts.train.name)
    read = {name: _examples(task, columns, classes, _part(parts, name)) for name, columns in raw.items()}
    train = read["train"]
    if "select" not in read:
        train, read["select"] = _hold_out(train)
    if limit is not None and limit < len(train):
        train = train.take(np.sort(_shuffled(len(train))[:limit]), f"{train.name}, {limit} at random (seed 0)")
    return TaskData(task, train, read["select"], read["report"], classes)


def _part(parts: Parts, name: str) -> str:
    part: Part = getattr(parts, name)
    return part.name


def _read(task: Task, part: Part) -> tuple[list[str], list[str] | None, list[Any]]:
    """Columns of one part."""
    (first, second, label), rows = part.open(task)
    texts: list[str] = []
    others: list[str] = []
    labels: list[Any] = []
    for number, row in enumerate(rows, start=1):
        texts.append(_text(row, first, part.name, number))
        if second is not None:
            others.append(_text(row, second, part.name, number))
        labels.append(row.get(label))
    if not texts:
        raise DataError(f"{part.name}: holds no example")
    return texts, others if second is not None else None, labels


def _text(row: Mapping[str, Any], column: str, where: str, number: int) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} of record {number} holds a {type(value).__name__}, not text")
    return value


def _classes(labels: Sequence[Any], where: str) -> tuple[str, ...]:
    """The distinct labels, numbers in numerical order."""
    found = sorted({_spelt(label) for label in labels}, key=lambda name: (_as_number(name), name))
    if len(found) < 2:
        raise DataError(f"{where}: all labels are {found[0]!r}; a classification needs at least two classes")
    if len(found) > max(2, len(labels) // 2):
        raise DataError(
            f"{where}: {len(found)} distinct labels in {len(labels)} examples, first {found[0][:40]!r}: the wrong "
            "column, or a regression (--regression)"
        )
    return tuple(found)


def _as_number(name: str) -> float:
    try:
        return float(name)
    except ValueError:
        return math.inf


def _spelt(label: Any) -> str:
    return str(label).strip()


def _examples(
    task: Task, columns: tuple[list[str], list[str] | None, list[Any]], classes: tuple[str, ...], where: str
) -> Examples:
    first, second, labels = columns
    numbers = {name: index for index, name in enumerate(classes)}
    if task.classes:  # the hub gives numbers where the benchmark's files give names
        numbers |= {str(index): index for index in range(len(classes))}
    values: list[float] = []
    for row, label in enumerate(labels, start=1):
        spelt = _spelt(label)
        value = _as_number(spelt) if task.regression else numbers.get(spelt)
        if value is None or not math.isfinite(value):
            allowed = "a number" if task.regression else f"one of {', '.join(classes[:20])}"
            raise DataError(f"{where}: the label of record {row} is {label!r}; it must be {allowed}")
        values.append(value)
    kind = np.float32 if task.regression else np.int64
    return Examples(tuple(first), None if second is None else tuple(second), np.asarray(values, dtype=kind), where)


def _hold_out(train: Examples) -> tuple[Examples, Examples]:
    """A tenth of the training part, at most 2,000 examples, to select on."""
    count = min(max(round(HELD_OUT * len(train)), 2), MOST_HELD_OUT)
    if len(train) < 2 * count:
        raise DataError(f"{train.name}: {len(train)} examples are too few to hold out some to select on")
    order = _shuffled(len(train))
    left, held = np.sort(order[count:]), np.sort(order[:count])
    return train.take(left, f"{train.name} without {count}"), train.take(held, f"{train.name}, {count} held out")


def _shuffled(count: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(count)
