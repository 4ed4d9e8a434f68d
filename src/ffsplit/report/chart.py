"""The page's charts as plain geometry, which the template draws as SVG; colours and fonts are the style sheet's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from ffsplit.report.rows import loss
from ffsplit.report.scale import Scale, scale_for, tick_labels

COLOURS = 6
_CHARACTER = 6.6
LINE_HEIGHT = 14.0
_ROOM_FOR_NAMES = 700.0
_WRECKED = 10.0


@dataclass(frozen=True)
class Tick:
    """A gridline and its number."""

    place: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A point; its label lies at ``(label_x, label_y)`` unless there was no room, then it is empty."""

    x: float
    y: float
    title: str
    emphasis: bool
    label: str = ""
    label_x: float = 0.0
    label_y: float = 0.0
    anchor: str = "start"


@dataclass(frozen=True)
class Line:
    """A polyline ``x,y x,y ...`` in one of the style sheet's colours, with its name at height ``label_y`` behind it."""

    points: str
    colour: int
    name: str
    label_y: float


@dataclass(frozen=True)
class Chart:
    """Everything to draw, in pixels of a ``width x height`` view."""

    width: float
    height: float
    box: tuple[float, float, float, float]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_label: str
    y_label: str
    marks: list[Mark] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    front: str = ""
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Axis:
    """What quality is drawn against; less is better.

    Attributes:
        of: a row's value in the axis's unit, if it has one.
        label: under the axis.
        unit: behind a value.
        front: which rows no other beats; None: those marked ``on_front``.
    """

    of: Callable[[Mapping[str, Any]], float | None]
    label: str
    unit: str
    front: Callable[[Sequence[Mapping[str, Any]]], Sequence[bool]] | None = None


MEMORY = Axis(lambda row: row["bytes_memory"] / 1e6 or None, "Memory of the loaded model, MB", "MB")


def quality_chart(rows: Sequence[Mapping[str, Any]], width: float, height: float, axis: Axis = MEMORY) -> Chart | None:
    """Quality against bytes in memory, or another axis, with the Pareto front; ``None`` unless two rows have both.

    Perplexities beyond ten times the best one would flatten all others; they are left out and named in ``missing``.
    """
    rated = [row for row in rows if axis.of(row) and math.isfinite(loss(row))]
    if len(rated) < 2:
        return None
    key, label = _quality(rated[0])
    limit = _WRECKED * min(loss(row) for row in rated) if key == "perplexity" else math.inf
    shown = [row for row in rated if loss(row) <= limit]
    missing = [str(row["name"]) for row in rows if row not in shown]
    box = (52.0, 14.0, width - 14.0, height - 46.0)
    values = [axis.of(row) or math.nan for row in shown]
    x_scale = scale_for(values, box[0], box[2])
    y_scale = scale_for([row[key] for row in shown], box[3], box[1], log=True)
    best = [bool(row["on_front"]) for row in shown] if axis.front is None else axis.front(shown)
    marks = [
        Mark(x_scale(x), y_scale(row[key]), f"{row['name']}: {x:,.1f} {axis.unit}, {key} {row[key]:.4g}", on_front,
             str(row["name"]))
        for row, x, on_front in zip(shown, values, best, strict=True)
    ]  # fmt: skip
    front = sorted((mark.x, mark.y) for mark in marks if mark.emphasis)
    return Chart(
        width, height, box, ticks(x_scale, width), ticks(y_scale, width), axis.label, label,
        marks=place_labels(marks, box), front=_stairs(front), missing=missing,
    )  # fmt: skip


def error_chart(layers: Mapping[str, Sequence[Mapping[str, Any]]], width: float, height: float) -> Chart | None:
    """Output error by layer, a line per checkpoint; ``None`` if no checkpoint has two.

    A wide chart leaves room for the lines' names behind their ends.
    """
    errors = {name: [layer["output_error"] for layer in its] for name, its in layers.items()}
    measured = {name: its for name, its in errors.items() if sum(error is not None for error in its) >= 2}
    if not measured:
        return None
    box = named_box(measured, width, height)
    x_scale = Scale(0.0, max(len(its) for its in measured.values()) - 1.0, box[0] + 8, box[2] - 8)
    present = [error for its in measured.values() for error in its if error is not None]
    y_scale = scale_for(present, box[3], box[1], zero=True)
    ends = spread([y_scale([e for e in its if e is not None][-1]) for its in measured.values()], LINE_HEIGHT)
    lines = [
        Line(" ".join(f"{x_scale(i):.1f},{y_scale(e):.1f}" for i, e in enumerate(its) if e is not None),
             number % COLOURS, name, end)
        for number, ((name, its), end) in enumerate(zip(measured.items(), ends, strict=True))
    ]  # fmt: skip
    x_ticks = [tick for tick in ticks(x_scale, width) if "." not in tick.label]
    return Chart(
        width, height, box, x_ticks, ticks(y_scale, width), "FFN, in execution order", "Relative output error",
        lines=lines,
    )  # fmt: skip


def named_box(names: Iterable[str], width: float, height: float) -> tuple[float, float, float, float]:
    """Where lines are drawn; a wide chart leaves room for their names behind their ends."""
    room = _CHARACTER * max(map(len, names)) + 12 if width >= _ROOM_FOR_NAMES else 0.0
    return 52.0, 14.0, width - 14.0 - min(room, width / 3), height - 46.0


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places moved apart just so far that no two are closer than ``gap``; their order stays."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for before, index in pairwise(order):
        moved[index] = max(moved[index], moved[before] + gap)
    # Centred again: pushing only downwards would carry a crowd away from its lines.
    shift = sum(moved) / len(moved) - sum(places) / len(places) if places else 0.0
    return [place - shift for place in moved]


def place_labels(marks: Sequence[Mark], box: tuple[float, float, float, float]) -> list[Mark]:
    """Put each label beside its mark where it covers nothing; those on the front choose first. No room: no label."""
    taken = [(mark.x - 6, mark.y - 6, mark.x + 6, mark.y + 6) for mark in marks]
    placed: dict[int, Mark] = {}
    for index in sorted(range(len(marks)), key=lambda i: not marks[i].emphasis):
        placed[index] = _placed(marks[index], box, taken)
    return [placed[index] for index in range(len(marks))]


def _placed(mark: Mark, box: tuple[float, float, float, float], taken: list[tuple[float, float, float, float]]) -> Mark:
    size = _CHARACTER * len(mark.label)
    for dx, dy, anchor in (
        (9, 4, "start"), (-9, 4, "end"), (0, -10, "middle"), (0, 20, "middle"), (7, -8, "start"), (7, 17, "start"),
        (-7, -8, "end"), (-7, 17, "end"),
    ):  # fmt: skip
        left = mark.x + dx - {"start": 0.0, "middle": size / 2, "end": size}[anchor]
        bottom = mark.y + dy + 3
        area = (left, bottom - LINE_HEIGHT, left + size, bottom)
        inside = area[0] >= box[0] and area[2] <= box[2] + 8 and area[1] >= box[1] - 8 and area[3] <= box[3]
        if inside and not any(_overlap(area, other) for other in taken):
            taken.append(area)
            return replace(mark, label_x=mark.x + dx, label_y=mark.y + dy, anchor=anchor)
    return replace(mark, label="")


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _quality(row: Mapping[str, Any]) -> tuple[str, str]:
    for key, label in (("perplexity", "Perplexity"), ("accuracy", "Accuracy on masked tokens")):
        if row[key] is not None:
            return key, label
    return "cosine", "Cosine to the reference"


def ticks(scale: Scale, width: float) -> list[Tick]:
    """Round values on a scale, as many as there is room for."""
    values = scale.ticks(4 if width < _ROOM_FOR_NAMES else 6)
    return [Tick(scale(value), label) for value, label in zip(values, tick_labels(values), strict=True)]


def _stairs(front: Sequence[tuple[float, float]]) -> str:
    """The border of what the front's points beat, as steps from point to point.

    Each step goes across first: memory grows before the better quality is had.
    """
    if len(front) < 2:
        return ""
    steps = [front[0]]
    for (_, before), (x, y) in pairwise(front):
        steps += [(x, before), (x, y)]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in steps)
