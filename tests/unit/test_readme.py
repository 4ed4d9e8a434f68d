"""The README says what the results say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from typer.main import get_command

from ffsplit.cli.main import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def script(name: str) -> ModuleType:
    """A script of the benchmarks, which are no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_the_one_that_was_measured() -> None:
    assert script("readme_table").updated(README) == README


def test_the_tables_of_tasks_are_those_that_were_measured() -> None:
    module = script("glue_table")
    for page, lines in zip(module.PAGES, module.tables(), strict=True):
        text = page.read_text(encoding="utf-8")
        assert module.updated(text, lines) == text, f"{page.name}: run benchmarks/glue_table.py"


def test_the_tables_of_speed_are_those_that_were_measured() -> None:
    module = script("speed_table")
    for name, (page, _, _) in module.TABLES.items():
        text = page.read_text(encoding="utf-8")
        assert module.updated(text, name) == text, f"{page.name}: run benchmarks/speed_table.py"


def test_links_and_commands_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    commands = get_command(app).commands  # type: ignore[attr-defined]
    named = set(re.findall(r"^ffsplit (\w+)", README, flags=re.MULTILINE))
    assert named
    assert named <= set(commands)
