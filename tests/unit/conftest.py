"""Fixtures of the unit tests."""

from __future__ import annotations

from tests.unit.cli_fixtures import bert, cli, compressed, llama, pruned, text, untouched

__all__ = ["bert", "cli", "compressed", "llama", "pruned", "text", "untouched"]
