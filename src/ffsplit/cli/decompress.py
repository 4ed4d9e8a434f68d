"""``ffsplit decompress``: back to dense weights that load everywhere."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ffsplit.cli import checks, loading, options
from ffsplit.cli.console import print_json, quiet, say
from ffsplit.cli.tables import show_facts, size

Compressed = Annotated[str, typer.Argument(help="A checkpoint in ffsplit's format.", metavar="DIR", show_default=False)]


def decompress(directory: Compressed, out: options.Out, as_json: options.Json = False) -> None:
    """Write a compressed checkpoint as a plain transformers one of the original shape."""
    checks.check_output(out, overwrite=False)
    checks.check_model_name(directory)
    loading.require_ffsplit(directory)
    with quiet():
        source = loading.source(directory)
        from ffsplit.checkpoint.decompress import decompress as run

        say(f"loading {directory}")
        model, tokenizer = run(source.load()), source.tokenizer()
        with _whole(out) as folder:
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if as_json:
        print_json({"directory": str(out), "bytes": written, "class": type(model).__name__})
    else:
        facts = [("directory", str(out)), ("class", type(model).__name__), ("size", size(written))]
        show_facts("Dense checkpoint", facts)


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A temporary sibling that becomes the output once everything is written."""
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=parent))
    try:
        yield folder
        os.replace(folder, out)
        out.chmod(0o755)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
