"""A comparison as one HTML file that needs nothing else: no scripts, no fonts, no network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ffsplit.files import write_whole
from ffsplit.report.chart import Chart, error_chart, quality_chart
from ffsplit.report.columns import COLUMNS, MISSING, columns_of
from ffsplit.report.speed_charts import latency_chart, speed_chart

PAGE_NAME = "compare.html"
SIGN = '<meta name="generator" content="ffsplit'
"""By which a page is known, near its beginning."""

WIDE, NARROW = (1040.0, 420.0), (376.0, 320.0)


def write_page(comparison: Mapping[str, Any], out: Path) -> Path:
    """Write the page.

    Args:
        comparison: ``Comparison.to_dict()``; its rows may hold infinite numbers.
        out: a file, or a folder (existing or without a suffix), which gets ``compare.html``.

    Returns:
        the file.
    """
    file = page_file(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file.resolve(), render_page(comparison))
    return file


def page_file(out: Path) -> Path:
    """Where the page goes: in a folder, existing or without a suffix, as ``compare.html``."""
    return out / PAGE_NAME if os.path.isdir(out) or not out.suffix else out


def render_page(comparison: Mapping[str, Any]) -> str:
    """The page's HTML. Everything that comes from a checkpoint is escaped."""
    environment = Environment(
        loader=PackageLoader("ffsplit.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows, layers = comparison["rows"], comparison["layers"]
    compressed = {name: its for name, its in layers.items() if its}
    benches = comparison["benches"]
    return environment.get_template("compare.html.j2").render(
        comparison=comparison,
        rows=rows,
        columns=columns_of(rows),
        column={column.key: column for column in COLUMNS},
        missing=MISSING,
        quality=_both(lambda size: quality_chart(rows, *size)),
        errors=_both(lambda size: error_chart(compressed, *size)),
        latency=_both(lambda size: latency_chart(rows, *size)),
        speeds=_both(lambda size: speed_chart(benches, *size)),
        verdicts={name: bench["verdicts"] for name, bench in benches.items() if bench.get("verdicts")},
        layers=compressed,
        structure={name: _structure(its) for name, its in compressed.items()},
    )


def _both(draw: Any) -> list[tuple[str, Chart]]:
    """A chart for wide screens and one for narrow ones, so that its letters are never scaled down."""
    charts = [("wide", draw(WIDE)), ("narrow", draw(NARROW))]
    return [(size, chart) for size, chart in charts if chart is not None]


def _structure(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs of neighbouring FFNs that have the same method and terms."""
    runs = []
    position = 0
    for (method, terms, keep, bits), run in groupby(
        layers, key=lambda layer: (layer["method"], tuple(layer["terms"]), layer["keep"], layer["bits"])
    ):
        count = len(list(run))
        ffns = str(position) if count == 1 else f"{position}–{position + count - 1}"
        runs.append({"ffns": ffns, "method": method, "terms": terms, "keep": keep, "bits": bits})
        position += count
    return runs
