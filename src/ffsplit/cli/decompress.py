"""``ffsplit decompress``: back to dense weights that load everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

from ffsplit.cli import checks, loading, options
from ffsplit.cli.console import print_json, quiet, say
from ffsplit.cli.tables import show_facts, size
from ffsplit.cli.writing import write_plain

Compressed = Annotated[str, typer.Argument(help="A checkpoint in ffsplit's format.", metavar="DIR", show_default=False)]


def decompress(directory: Compressed, out: options.Out, as_json: options.Json = False) -> None:
    """Write a compressed checkpoint as a plain transformers one of the original shape."""
    checks.check_output(out)
    checks.check_model_name(directory)
    loading.require_ffsplit(directory)
    with quiet():
        source = loading.source(directory)
        from ffsplit.checkpoint.decompress import decompress as run

        say(f"loading {directory}")
        model, tokenizer = run(source.load()), source.tokenizer()
        written = write_plain(out, model, tokenizer)
    if as_json:
        print_json({"directory": str(out), "bytes": written, "class": type(model).__name__})
    else:
        facts = [("directory", str(out)), ("class", type(model).__name__), ("size", size(written))]
        show_facts("Dense checkpoint", facts)
