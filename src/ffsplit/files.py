"""Files that appear whole or not at all, and directories that belong to one run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ffsplit.errors import ResumeError

JOURNAL, RECOVERY = "journal.json", "recovery.json"
IDENTITIES = (JOURNAL, RECOVERY)
"""Names of the files that say whose directory it is, and hold no work."""


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A sibling to write to, which takes the file's place once the block has ended without an error.

    Its name is nobody else's, but the same each time: what a killed process left is written over. After an error it is
    gone.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(file: Path, content: str) -> None:
    """Write text, UTF-8."""
    with whole_file(file) as partial:
        partial.write_text(content, encoding="utf-8")


def read_json(file: Path, cure: str) -> Any:
    """What a JSON file holds.

    Args:
        file: that is there.
        cure: what to do if it is damaged, for the message.

    Raises:
        ResumeError: it is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResumeError(f"{file} is damaged ({error}); {cure}") from error


def read_object(file: Path, cure: str) -> dict[str, Any]:
    """As :func:`read_json`, of a file that holds one JSON object."""
    stored = read_json(file, cure)
    if not isinstance(stored, dict):
        raise ResumeError(f"{file} is damaged (it holds a {type(stored).__name__}, not an object); {cure}")
    return stored


def claim_directory(file: Path, identity: dict[str, Any], run: str, *, writes: bool = True) -> None:
    """Take the directory of a file for a run, or go on with the same run in it.

    Args:
        file: that holds the identity, as JSON; its directory is made if missing.
        identity: what an interrupted run and its continuation must share, as plain values.
        run: what it is, for the message.
        writes: whether this process writes.

    Raises:
        ResumeError: the directory holds another run, or a damaged one.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        if writes:
            write_whole(file, json.dumps(identity, indent=1))
        return
    stored = read_json(file, "remove the directory to start afresh")
    found = stored if isinstance(stored, dict) else {}
    if found != identity:
        differing = sorted(key for key in {*found, *identity} if found.get(key) != identity.get(key))
        raise ResumeError(
            f"{file.parent} belongs to a {run} with other {', '.join(differing)}; remove it to start afresh, or "
            "repeat the interrupted command"
        )
