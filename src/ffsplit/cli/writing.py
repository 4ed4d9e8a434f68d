"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(out: Path) -> Iterator[Path]:
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


def write_plain(out: Path, model: Any, tokenizer: Any | None) -> int:
    """Write a plain transformers checkpoint with its tokenizer; the bytes of all its files."""
    with whole(out) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
