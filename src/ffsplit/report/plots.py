"""Figures with matplotlib's object interface: one style, no global state, the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

INK, SOFT, RULE, ACCENT, WARM = "#1b1d1f", "#5b6068", "#dfe0dc", "#0b5fa5", "#b3501b"
DEPTH = LinearSegmentedColormap.from_list("depth", ["#f2b28b", "#c2557a", "#6a3d8f", "#173a6b"])
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.minor.size": 0,
    "figure.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "ffsplit",
}


@dataclass(frozen=True)
class NormCurves:
    """Sorted output norms of one model: ``norms[layer][i]`` is that of the neuron at place ``ranks[i]`` (from 1)."""

    title: str
    ranks: Sequence[int]
    norms: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Bar:
    """A measured value; with ``low`` and ``high`` if it is the mean of several; ``emphasis`` colours it."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    emphasis: bool = False


@dataclass(frozen=True)
class BarPanel:
    """Bars of one model on one measure, which start at the dense model's value; ``log`` for very unequal ones."""

    title: str
    measure: str
    dense: float
    bars: Sequence[Bar]
    log: bool = False


def norm_figure(models: Sequence[NormCurves], heavy: float = 0.03) -> Figure:
    """Output norms of sorted neurons, a panel per model and a line per layer, coloured by depth; log scale.

    Args:
        models: at least one.
        heavy: share of neurons to mark.
    """
    with styled():
        figure = Figure(figsize=(1.0 + 3.2 * len(models), 3.2), layout="constrained")
        panels = figure.subplots(1, len(models), squeeze=False)[0]
        for axes, model in zip(panels, models, strict=True):
            last, neurons = max(len(model.norms) - 1, 1), model.ranks[-1]
            for layer, norms in enumerate(model.norms):
                axes.plot(model.ranks, norms, color=DEPTH(layer / last), linewidth=1.0)
            axes.axvline(heavy * neurons, color=SOFT, linewidth=0.8, linestyle=(0, (3, 3)))
            axes.annotate(f"{100 * heavy:.0f} %", (heavy * neurons, 0.98), (4, 0), va="top", color=SOFT,
                          xycoords=("data", "axes fraction"), textcoords="offset points")  # fmt: skip
            axes.set(title=model.title, yscale="log", xlabel="neurons, sorted", xlim=(-0.03 * neurons, neurons))
            axes.grid(False, axis="x")
        panels[0].set_ylabel("output norm (RMS over tokens)")
        scale = figure.colorbar(ScalarMappable(Normalize(0, 1), DEPTH), ax=panels.tolist(), pad=0.015, fraction=0.03)
        scale.set_ticks([0, 1], labels=["first layer", "last"])
        scale.outline.set_visible(False)
    return figure


def bar_figure(panels: Sequence[BarPanel]) -> Figure:
    """Horizontal bars of how far each value is from the dense one, a panel per model, every value written out."""
    with styled():
        figure = Figure(figsize=(1.4 + 3.0 * len(panels), 2.3), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _bars(axes, panel, labelled=panel is panels[0])
    return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.png`` and ``stem.svg`` (text stays text), without the date that would change them every time."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    with styled():
        figure.savefig(files[0], dpi=200, metadata={"Software": None})
        figure.savefig(files[1], metadata={"Date": None, "Creator": None})
    return files


def _bars(axes: Axes, panel: BarPanel, labelled: bool) -> None:
    places = range(len(panel.bars))
    if panel.log:
        axes.set_xscale("log")
    lengths = [bar.value - panel.dense for bar in panel.bars]
    axes.barh(
        places, lengths, left=panel.dense, height=0.56, color=[WARM if bar.emphasis else ACCENT for bar in panel.bars]
    )
    for place, bar in enumerate(panel.bars):
        if bar.low is not None and bar.high is not None:
            axes.plot([bar.low, bar.high], [place, place], color=INK, linewidth=1.0, marker="|", markersize=7)
        axes.annotate(number(bar.value), (1.02, place), xycoords=("axes fraction", "data"), va="center", color=INK)
    axes.axvline(panel.dense, color=INK, linewidth=1.0)
    side = "left" if all(length >= 0 for length in lengths) else "right"
    axes.annotate(
        f"dense {number(panel.dense)}", (panel.dense, 1.0), (0, 3), color=INK, xycoords=("data", "axes fraction"),
        textcoords="offset points", va="bottom", ha=side,
    )  # fmt: skip
    axes.set_yticks(list(places), [bar.label for bar in panel.bars] if labelled else [""] * len(panel.bars))
    axes.tick_params(axis="y", labelcolor=INK)
    axes.invert_yaxis()
    axes.set_title(panel.title, pad=22)
    axes.set_xlabel(panel.measure)
    axes.margins(x=0.12)
    axes.spines["left"].set_visible(False)
    axes.grid(False, axis="y")


def number(value: float) -> str:
    """A value with the digits that matter."""
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"


@contextmanager
def styled() -> Iterator[None]:
    """The style of all figures, put back afterwards."""
    with matplotlib.rc_context(STYLE):
        yield
