"""``ffsplit slice``: a narrower model from a sorted checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from ffsplit.cli import checks, loading, options
from ffsplit.cli.console import print_json, quiet, say
from ffsplit.cli.tables import show_facts, size
from ffsplit.cli.writing import write_plain

Sorted = Annotated[str, typer.Argument(help="A checkpoint of the method sort.", metavar="DIR", show_default=False)]
Width = Annotated[float, typer.Option("--width", help="Share of every FFN's neurons, 0 to 1.", show_default=False)]


def slice_(directory: Sorted, out: options.Out, width: Width, as_json: options.Json = False) -> None:
    """Write the first neurons of every FFN of a sorted checkpoint as a plain transformers one."""
    checks.check_output(out)
    checks.check_model_name(directory)
    with quiet():
        source = loading.source(directory)
        from ffsplit.checkpoint.slice import load

        say(f"loading {directory}")
        model, tokenizer = load(directory, width=width), source.tokenizer()
        written = write_plain(out, model, tokenizer)
    if as_json:
        print_json({"directory": str(out), "bytes": written, "class": type(model).__name__, "width": width})
    else:
        facts = [("directory", str(out)), ("class", type(model).__name__), ("size", size(written))]
        show_facts(f"Slice of width {width:g}", facts)
