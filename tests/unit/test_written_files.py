"""Single files that commands write: in their place, whole, and never over somebody else's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ffsplit.cli import checks
from ffsplit.errors import CheckpointError
from ffsplit.files import write_whole
from ffsplit.report.page import SIGN, write_page
from tests.unit.cli_fixtures import Call
from tests.unit.test_bad_input import check_refused
from tests.unit.test_report_page import document, row

BENCH = {"format": "ffsplit-bench", "version": 1}


def must_not_run(*_: object, **__: object) -> Any:
    raise AssertionError("work was done before the refusal")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bench that measures nothing."""
    found = SimpleNamespace(to_dict=lambda: dict(BENCH))
    monkeypatch.setattr("ffsplit.bench.run.bench", lambda *_, **__: found)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["", "new/bench.json", "earlier.json", "empty.json", "link.json"])
def test_bench_writes_its_result(cli: Call, llama: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "earlier.json").write_text(json.dumps({**BENCH, "model": "another"}))
    (tmp_path / "empty.json").touch()
    (tmp_path / "link.json").symlink_to("earlier.json")
    assert cli("bench", llama, "--out", tmp_path / name, "--json").document == BENCH
    assert json.loads((tmp_path / (name or "ffsplit_bench.json")).read_text()) == BENCH
    assert (tmp_path / "link.json").is_symlink()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("thesis.json", "not a result of bench"),
        ("thesis.json/bench.json", "is a file"),
        ("folder", "ffsplit_bench.json exists and is not a file"),
        ("x" * 250, "no file can be made there"),
    ],
)
def test_bench_refuses_other_places(
    cli: Call, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    (tmp_path / "thesis.json").write_text('{"chapter": 1}')
    (tmp_path / "folder" / "ffsplit_bench.json").mkdir(parents=True)
    monkeypatch.setattr("ffsplit.bench.run.bench", must_not_run)
    check_refused(cli("bench", llama, "--out", tmp_path / name), words)
    assert (tmp_path / "thesis.json").read_text() == '{"chapter": 1}'


@pytest.mark.parametrize("name", ["site.html", ""])
def test_compare_refuses_a_page_of_others(
    cli: Call, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    page = tmp_path / (name or "compare.html")
    page.write_text("<!doctype html><title>my site</title>")
    monkeypatch.setattr("ffsplit.report.compare.compare_checkpoints", must_not_run)
    check_refused(cli("compare", llama, "--out", tmp_path / name), page.name, "not an earlier page of compare")
    assert "my site" in page.read_text()


def test_an_earlier_page_may_be_replaced(tmp_path: Path) -> None:
    page = write_page(document([row("dense", 100.0, 10.0)]), tmp_path)
    checks.check_file(page, SIGN, "an earlier page")
    assert [path.name for path in tmp_path.iterdir()] == ["compare.html"]


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: object) -> Any:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "page.html").write_text("secret")
    monkeypatch.setattr(Path, "open", unreadable)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        checks.check_file(tmp_path / "page.html", SIGN, "an earlier page")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_whole(file, "old")
    (tmp_path / "page.partial").write_text("mine")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "half" * 10000 + "\ud800")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"page.html": "old", "page.partial": "mine"}
