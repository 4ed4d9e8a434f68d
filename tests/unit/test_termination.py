"""SIGTERM ends a command as Ctrl-C does."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from transformers import PreTrainedModel

from ffsplit.cli.guard import Terminated, terminable
from ffsplit.pipeline.journal import Journal
from tests.unit.cli_fixtures import SMALL, Call


def ours(*_: object) -> None:
    """The handler of a program that calls the command line; without one the tests themselves would end."""


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, ours)
    yield
    assert signal.getsignal(signal.SIGTERM) == ours
    signal.signal(signal.SIGTERM, before)


def terminated(*_: object, **__: object) -> Any:
    signal.raise_signal(signal.SIGTERM)


def run(cli: Call, llama: Path, tmp_path: Path) -> Any:
    options = ("--recipe", "svd", "--keep", "0.5", "--cache-dir", tmp_path / "cache", "--device", "cpu", *SMALL)
    return cli("compress", llama, "--out", tmp_path / "out", *options)


def test_while_saving(cli: Call, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", terminated)
        outcome = run(cli, llama, tmp_path)
    assert outcome.code == 143
    assert "repeat the same command" in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out.ffsplit-journal"]
    assert "resuming: 2 FFNs" in run(cli, llama, tmp_path).err


def test_while_activations_are_on_disk(cli: Call, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated_there(*_: object) -> None:
        assert any((tmp_path / "cache").iterdir())
        terminated()

    monkeypatch.setattr(Journal, "store", terminated_there)
    assert run(cli, llama, tmp_path).code == 143
    assert list((tmp_path / "cache").iterdir()) == []
    assert not (tmp_path / "out.ffsplit-journal").exists()


def test_a_second_one_does_not_disturb_cleaning_up() -> None:
    cleaned = []

    def end_twice() -> None:
        try:
            terminated()
        finally:
            terminated()
            cleaned.append(True)

    with pytest.raises(Terminated), terminable():
        end_twice()
    assert cleaned


def test_other_threads_and_ignored_signals_are_left_alone() -> None:
    found: list[object] = []

    def look() -> None:
        with terminable():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = Thread(target=look)
    thread.start()
    thread.join()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    look()
    signal.signal(signal.SIGTERM, ours)
    assert found == [ours, signal.SIG_IGN]
