"""Numbers that were measured, by name, in a file that outlasts a killed run."""

from __future__ import annotations

import json
from pathlib import Path

from ffsplit.files import read_object, write_whole


class Ledger:
    """Measured numbers under string keys, written as soon as each is known.

    Args:
        file: a JSON file; without one the numbers last as long as this object.

    Raises:
        ResumeError: the file is damaged.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._values: dict[str, float] = {}
        if file is not None and file.exists():
            self._values = read_object(file, "remove it to measure again")

    def get(self, key: str) -> float | None:
        """The number under a key, or None."""
        return self._values.get(key)

    def put(self, key: str, value: float) -> None:
        """Keep a number; the file appears whole or not at all."""
        self._values[key] = value
        if self._file is not None:
            write_whole(self._file, json.dumps(self._values, indent=1))
