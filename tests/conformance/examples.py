"""Results of the cases, fitted and stored once for all tests that look at them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import ffsplit

Fit = Callable[[str, str, dict[str, Any]], ffsplit.CompressionResult]


class Examples:
    """What a case gives on a family, made when it is asked for first. Tests read it and never change it.

    Args:
        fit: compresses a tiny model of a family by the method or planner of a name with the settings of a case.
        folders: where checkpoints go.
    """

    def __init__(self, fit: Fit, folders: pytest.TempPathFactory) -> None:
        self._fit = fit
        self._folders = folders
        self._results: dict[str, ffsplit.CompressionResult] = {}
        self._checkpoints: dict[str, ffsplit.SavedCheckpoint] = {}

    def result(self, family: str, name: str, case: dict[str, Any]) -> ffsplit.CompressionResult:
        """The compressed model and what is known of it."""
        key = json.dumps([family, name, case])
        if key not in self._results:
            self._results[key] = self._fit(family, name, case)
        return self._results[key]

    def checkpoint(self, family: str, name: str, case: dict[str, Any]) -> ffsplit.SavedCheckpoint:
        """The result on disk."""
        key = json.dumps([family, name, case])
        if key not in self._checkpoints:
            folder = self._folders.mktemp("example") / "out"
            self._checkpoints[key] = ffsplit.save(self.result(family, name, case), folder)
        return self._checkpoints[key]
