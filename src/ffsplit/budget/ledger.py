"""Numbers that were measured, by name, in a file that outlasts a killed run."""

from __future__ import annotations

import json
from pathlib import Path

from ffsplit.errors import ResumeError


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
            try:
                self._values = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ResumeError(f"{file} is damaged ({error}); remove it to measure again") from error

    def get(self, key: str) -> float | None:
        """The number under a key, or None."""
        return self._values.get(key)

    def put(self, key: str, value: float) -> None:
        """Keep a number; the file appears whole or not at all."""
        self._values[key] = value
        if self._file is not None:
            partial = self._file.with_suffix(".partial")
            partial.write_text(json.dumps(self._values, indent=1), encoding="utf-8")
            partial.replace(self._file)
