"""The plain checkpoints of ``decompress`` and ``slice``: where they go, and who may read them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ffsplit.cli.writing import write_plain
from tests.unit.cli_fixtures import SIZES, Call
from tests.unit.evaluate_helpers import byte_tokenizer, tiny_llama


def test_decompress_into_the_current_directory(
    cli: Call, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    outcome = cli("decompress", compressed, "--out", ".", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.document["bytes"] == sum(file.stat().st_size for file in here.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_link_to_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write_plain(tmp_path / "link", tiny_llama(**SIZES), None)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_follow_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_plain(tmp_path / "out", tiny_llama(**SIZES), byte_tokenizer())
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o666 & ~mask}
