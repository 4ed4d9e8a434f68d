"""Results of ``ffsplit bench`` that belong to the checkpoints of a comparison."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ffsplit.bench.result import BENCH_FILE, FORMAT, VERSION
from ffsplit.errors import DataError
from ffsplit.report.facts import CheckpointFacts


def read_benches(checkpoints: Sequence[CheckpointFacts], files: Sequence[Path] = ()) -> dict[str, dict[str, Any]]:
    """Bench documents by the checkpoint's name: the given ones, and those in the checkpoints' folders.

    Raises:
        DataError: a file is missing, no such document, of a later version, or of a model that is not compared.
    """
    inside = [(facts.name, Path(facts.source.name).expanduser() / BENCH_FILE) for facts in checkpoints]
    found = {name: _read(file) for name, file in inside if file.is_file()}
    for file in files:
        document = _read(file)
        found[_owner(document, checkpoints, file)] = document
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as the result of a bench: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(f"{file}: is not what `ffsplit bench` writes")
    version = document.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise DataError(f"{file}: has version {version!r}; this ffsplit reads up to {VERSION}")
    return document


def _owner(document: dict[str, Any], checkpoints: Sequence[CheckpointFacts], file: Path) -> str:
    """The name of the checkpoint that a document is about."""
    for facts in checkpoints:
        if _place(facts.source.name) == _place(str(document["model"])):
            return facts.name
    names = ", ".join(facts.source.name for facts in checkpoints)
    raise DataError(f"{file}: is of {document['model']}, which is none of {names}")


def _place(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
