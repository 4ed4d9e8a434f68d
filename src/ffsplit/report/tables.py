"""A comparison as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ffsplit.report.columns import MISSING, columns_of


def comparison_table(rows: Sequence[Mapping[str, Any]], title: str = "Comparison") -> Table:
    """One line per checkpoint; ``*`` marks those on the Pareto front of memory and quality."""
    columns = columns_of(rows)
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("checkpoint", overflow="fold")
    table.add_column("method", overflow="fold")
    for column in columns:
        unit = f"\n{column.unit}" if column.unit else ""
        table.add_column(Text(f"{column.heading}{unit}"), justify="right", no_wrap=True)
    for row in rows:
        name = f"{row['name']} *" if row["on_front"] else str(row["name"])
        cells = [column.text(row) for column in columns]
        table.add_row(Text(name), Text(row["method"] or "dense"), *cells)
    return table


def layer_table(layers: Sequence[Mapping[str, Any]], title: str = "FFNs") -> Table:
    """One line per FFN of a checkpoint: ``Comparison.to_dict()["layers"][name]``."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for heading in ("FFN", "method", "branches"):
        table.add_column(heading, overflow="fold")
    for heading in ("kept %", "bits", "output error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in layers:
        error = layer["output_error"]
        table.add_row(
            Text(layer["ffn"]),
            layer["method"] or "untouched",
            Text("\n".join(layer["terms"])),
            f"{100 * layer['keep']:.1f}",
            f"{layer['bits']:.2f}",
            MISSING if error is None else f"{error:.4f}",
        )
    return table
