"""Figures: what is drawn, and that the same numbers give the same files."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest

from ffsplit.report.plots import Bar, BarPanel, NormCurves, bar_figure, norm_figure, number, save_figure

CURVES = NormCurves("model", [1, 2, 10], [[5.0, 1.0, 0.1], [4.0, 0.5, 0.2]])
PANEL = BarPanel("model", "perplexity", 17.9, [Bar("light", 18.0), Bar("random", 20.0, 19.0, 21.0)], log=True)


def test_a_line_per_layer_on_a_log_scale() -> None:
    axes = norm_figure([CURVES, CURVES]).axes
    assert [panel.get_yscale() for panel in axes[:2]] == ["log", "log"]
    lines = [line for line in axes[0].lines if len(line.get_xdata()) == 3]
    assert [list(line.get_ydata()) for line in lines] == CURVES.norms
    assert lines[0].get_color() != lines[1].get_color()


def test_bars_start_at_the_dense_value() -> None:
    (axes,) = bar_figure([PANEL]).axes
    assert [bar.get_x() for bar in axes.patches] == [17.9, 17.9]
    assert [bar.get_x() + bar.get_width() for bar in axes.patches] == pytest.approx([18.0, 20.0])
    assert {text.get_text() for text in axes.texts} == {"dense 17.90", "18.00", "20.00"}


def test_values_keep_the_digits_that_matter() -> None:
    assert [number(value) for value in (17.891, -0.5, 158784.2)] == ["17.89", "-0.50", "158,784"]


def test_files_are_the_same_every_time_and_the_style_stays_local(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    first = [file.read_bytes() for file in save_figure(norm_figure([CURVES]), tmp_path / "a" / "norms")]
    second = [file.read_bytes() for file in save_figure(norm_figure([CURVES]), tmp_path / "b" / "norms")]
    assert first == second
    assert b"<text" in first[1]
    assert dict(matplotlib.rcParams) == before
