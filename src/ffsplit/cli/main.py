"""The command line: ``ffsplit COMMAND``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated

import typer

from ffsplit.cli.bench import bench
from ffsplit.cli.compare import compare
from ffsplit.cli.compress import compress
from ffsplit.cli.decompress import decompress
from ffsplit.cli.demo import demo
from ffsplit.cli.eval import evaluate
from ffsplit.cli.export import export
from ffsplit.cli.glue import glue
from ffsplit.cli.guard import GuardedGroup
from ffsplit.cli.inspect import inspect
from ffsplit.cli.methods import methods
from ffsplit.cli.recover import recover
from ffsplit.cli.slice import slice_

app = typer.Typer(
    name="ffsplit",
    cls=GuardedGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("inspect")(inspect)
app.command("compress")(compress)
app.command("eval")(evaluate)
app.command("compare")(compare)
app.command("bench")(bench)
app.command("glue")(glue)
app.command("methods")(methods)
app.command("decompress")(decompress)
app.command("recover")(recover)
app.command("slice")(slice_)
app.command("export")(export)
app.command("demo")(demo)


def _version(wanted: bool) -> None:
    if wanted:
        packages = ("ffsplit", "torch", "transformers")
        typer.echo(", ".join(f"{name} {metadata.version(name)}" for name in packages))
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the versions.")]


@app.callback()
def ffsplit(version: Version = False) -> None:
    """Make the feed-forward networks of a Hugging Face model smaller and faster, and prove it with numbers."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0, 2 for refused input, 130 or 143 when stopped, 1 for a bug.

    Args:
        arguments: instead of those of the process.
    """
    typer.main.get_command(app).main(args=sys.argv[1:] if arguments is None else list(arguments), prog_name="ffsplit")
