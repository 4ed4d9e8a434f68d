"""``ffsplit compare``: several checkpoints in one table and on one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ffsplit.cli import checks, loading, options
from ffsplit.cli.console import console, print_json, quiet
from ffsplit.cli.progress import reporting
from ffsplit.cli.tables import line

if TYPE_CHECKING:
    from ffsplit.report.compare import Comparison

Dirs = Annotated[
    list[str], typer.Argument(help="The dense model first, then checkpoints.", metavar="DIR...", show_default=False)
]
Page = Annotated[Path, typer.Option("--out", "-o", help="The HTML page to write.", metavar="FILE")]
Benches = Annotated[
    list[Path] | None,
    typer.Option("--bench", help="What `ffsplit bench --out` wrote of one of them; may be repeated.", metavar="FILE"),
]
Speed = Annotated[bool, typer.Option("--speed/--no-speed", help="Measure speed too.")]


def compare(
    dirs: Dirs,
    out: Page = Path("compare.html"),
    data: options.Data = "builtin",
    field: options.Field = None,
    samples: options.Samples = 8,
    seq_len: options.SeqLen = 512,
    device: options.Device = None,
    dtype: options.Dtype = None,
    speed: Speed = True,
    bench: Benches = None,
    as_json: options.Json = False,
) -> None:
    """Measure checkpoints on the same text and machine: a table, and one HTML page that stands alone."""
    for place in dirs:
        checks.check_model_name(place)
    from ffsplit.report.page import SIGN, page_file

    checks.check_file(page_file(out), SIGN, "an earlier page of compare")
    settings = loading.settings(device, dtype)
    with quiet(), reporting() as report:
        loading.register()
        checks.check_text(data, field, "evaluation")
        from ffsplit.report.compare import compare_checkpoints

        comparison = compare_checkpoints(
            dirs,
            data=data,
            field=field,
            samples=samples or 8,
            seq_len=seq_len or 512,
            device=settings.device,
            dtype=settings.dtype,
            out=out,
            speed=speed,
            benches=bench or (),
            progress=report,
        )
    if as_json:
        print_json(comparison.to_dict())
    else:
        show_comparison(comparison)


def show_comparison(comparison: Comparison) -> None:
    """The table, and what it is to be read against."""
    from ffsplit.report.tables import comparison_table

    console().print(comparison_table(comparison.rows))
    line("* no other checkpoint is both smaller in memory and better.")
    if not comparison.reference_is_dense:
        line(f"The first checkpoint, {comparison.rows[0]['name']}, is itself compressed: KL and speed are against it.")
    if comparison.page is not None:
        line(f"Page: {comparison.page}")
