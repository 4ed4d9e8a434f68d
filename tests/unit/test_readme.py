"""The README says what the results say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from typer.main import get_command

from ffsplit.cli.main import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_table_is_the_one_that_was_measured() -> None:
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks" / "readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.updated(README) == README


def test_links_and_commands_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    commands = get_command(app).commands  # type: ignore[attr-defined]
    named = set(re.findall(r"^ffsplit (\w+)", README, flags=re.MULTILINE))
    assert named
    assert named <= set(commands)
