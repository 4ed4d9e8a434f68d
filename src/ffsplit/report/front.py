"""The front of predicted damage over cost as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ffsplit.report.chart import Mark, place_labels
from ffsplit.report.plots import ACCENT, INK, SOFT, WARM, styled

METRICS = {"kl": "KL divergence", "js": "JS divergence", "angular": "angular distance", "norm": "relative distance"}
SPAN = 1e-4
"""Damages below this share of the largest are not drawn: a log scale would give them most of the room."""

CLOSE = 40.0
"""Points of the page between two checkpoints at which each gets a name of its own."""


def front_figure(document: Mapping[str, Any]) -> Figure:
    """The front as a line, plans that treat all layers alike as dots, checkpoints with names and measured damage.

    Args:
        document: of :func:`ffsplit.pipeline.pareto.front_of`, with ``checkpoints`` if there are any.
    """
    unit = 1e6 if document["budget"] == "bytes" else 1.0
    found = [(point["value"] / unit, point["predicted_damage"]) for point in document["points"]]
    highest = max((damage for _, damage in found), default=1.0)
    line = [point for point in found if point[1] > highest * SPAN] or found
    # None stands for a damage that is not finite, which has no place here.
    alike = [(point["value"] / unit, point["predicted_damage"] or 0.0) for point in document["uniform"]]
    dots = [point for point in alike if highest * SPAN < point[1] <= 3 * highest and point[0] <= line[-1][0]]
    saved = [mark for one in document.get("checkpoints", ()) if (mark := _checkpoint(one, unit)) is not None]
    with styled():
        figure = Figure(figsize=(6.6, 4.0), dpi=72, layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*line, strict=True), color=ACCENT, linewidth=1.4, marker="o", markersize=2.6,
                  label="layer by layer, predicted")  # fmt: skip
        if dots:
            axes.plot(*zip(*dots, strict=True), color=SOFT, linestyle="", marker="x", markersize=4.5,
                      label="the same in all layers, predicted")  # fmt: skip
        if saved:
            axes.plot([x for x, _, _ in saved], [y for _, y, _ in saved], color=WARM, linestyle="", marker="o",
                      markersize=6.5, label=_checkpoints(document), zorder=3)  # fmt: skip
        _scales(axes, [*line, *dots])
        axes.set(xlabel=_in_megabytes(document["unit"]), title="Damage over cost",
                 ylabel=f"damage to the answers ({METRICS[document['metric']]})")  # fmt: skip
        figure.legend(frameon=False, loc="outside lower center", ncols=3, labelcolor=INK, fontsize=8.5)
        _name(figure, axes, saved, [*line, *dots])
    return figure


def _checkpoint(entry: Mapping[str, Any], unit: float) -> tuple[float, float, str] | None:
    """Where a checkpoint lies; where its predicted damage is if it was not measured."""
    if entry["value"] is None:
        return None
    measured = entry["measured_damage"]
    return entry["value"] / unit, entry["predicted_damage"] if measured is None else measured, entry["budget"]


def _checkpoints(document: Mapping[str, Any]) -> str:
    drawn = [entry for entry in document["checkpoints"] if entry["value"] is not None]
    measured = all(entry["measured_damage"] is not None for entry in drawn)
    return "checkpoints, measured" if measured else "checkpoints"


def _in_megabytes(unit: str) -> str:
    return unit.replace("bytes of", "MB of")


def _scales(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    if all(damage > 0 for _, damage in points):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.04, y=0.08)


def _name(
    figure: Figure, axes: Axes, saved: Sequence[tuple[float, float, str]], others: Sequence[tuple[float, float]]
) -> None:
    """Names beside the checkpoints, where they cover nothing; the layout must be known for that."""
    figure.draw_without_rendering()
    height = float(figure.bbox.height)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = axes.transData.transform((x, y))
        return float(across), height - float(up)

    named = _together([(*place(x, y), name) for x, y, name in saved])
    marks = [Mark(x, y, title="", emphasis=True, label=label) for x, y, label in named]
    marks += [Mark(*place(x, y), title="", emphasis=False) for x, y in [*others, *((x, y) for x, y, _ in saved)]]
    left, bottom, right, top = axes.bbox.extents
    for mark in place_labels(marks, (left, height - top, right, height - bottom))[: len(named)]:
        across, up = map(float, axes.transData.inverted().transform((mark.x, height - mark.y)))
        axes.annotate(
            mark.label, (across, up), (mark.label_x - mark.x, mark.y - mark.label_y), textcoords="offset points",
            color=INK, ha={"start": "left", "middle": "center", "end": "right"}[mark.anchor],
        )  # fmt: skip


def _together(places: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """One name for neighbours that have no room for one each, at the middle one of them."""
    groups: list[list[tuple[float, float, str]]] = []
    for place in sorted(places):
        if groups and math.dist(groups[-1][-1][:2], place[:2]) < CLOSE:
            groups[-1].append(place)
        else:
            groups.append([place])
    found = []
    for group in groups:
        x, y, _ = group[len(group) // 2]
        first, *others = [name for _, _, name in group]
        found.append((x, y, ", ".join([first, *(name.partition("=")[2] for name in others)])))
    return found
