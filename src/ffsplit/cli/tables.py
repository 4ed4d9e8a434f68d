"""Results for people: plain tables on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table

from ffsplit.cli.console import console

Row = Sequence[str]


def show(title: str, columns: Sequence[str], rows: Iterable[Row], *, words: int = 1) -> None:
    """Print a table.

    Args:
        title: above it.
        columns: headings.
        rows: cells, as text.
        words: how many columns from the left hold words; those after them are numbers and stand on the right.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for index, heading in enumerate(columns):
        table.add_column(heading, justify="left" if index < words else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table, markup=False)


def show_facts(title: str, facts: Iterable[tuple[str, str]]) -> None:
    """Print names and values, a line each."""
    table = Table(title=title, title_justify="left", box=None, show_header=False, title_style="bold", pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(f"  {name}", value)
    console().print(table, markup=False)
    console().print()


def line(text: str) -> None:
    """Print a line as it is, however long."""
    console().print(text, markup=False, soft_wrap=True)


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def size(count: float) -> str:
    """Bytes in a readable unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}" if unit == "GB" else f"{count / scale:,.1f} {unit}"
    return f"{count:.0f} B"
