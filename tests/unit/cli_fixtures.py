"""Tiny checkpoints on disk, and the command line called in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from ffsplit.cli.main import main
from tests.unit.evaluate_helpers import byte_tokenizer, tiny_bert, tiny_llama

SIZES = {"hidden_size": 32, "intermediate_size": 64}
SMALL = ("--samples", "3", "--seq-len", "32")
"""Options of a run that takes no time."""


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output as the one JSON document that it must be."""
        return json.loads(self.out)


Call = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Call:
    """``cli("compress", model, "--out", out)``."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Outcome(int(left.value.code or 0), printed.out, printed.err)

    return call


def saved(model: PreTrainedModel, folder: Path, *, tokenizer: bool = True) -> Path:
    """A checkpoint folder of a model, with a tokenizer of one token per byte."""
    model.save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer. Not to be changed."""
    return saved(tiny_llama(**SIZES), tmp_path_factory.mktemp("cli") / "llama")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a masked-LM head. Not to be changed."""
    return saved(tiny_bert(**SIZES), tmp_path_factory.mktemp("cli") / "bert")


@pytest.fixture(scope="session")
def compressed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in ffsplit's format. Not to be changed."""
    return _compressed(llama, tmp_path_factory.mktemp("cli") / "packed", "--bits", "5")


@pytest.fixture(scope="session")
def pruned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with half of its neurons, a stock checkpoint. Not to be changed."""
    return _compressed(llama, tmp_path_factory.mktemp("cli") / "pruned", "--recipe", "prune", "--keep", "0.5")


def _compressed(model: Path, out: Path, *budget: str) -> Path:
    with pytest.raises(SystemExit) as left:
        main(["compress", str(model), "--out", str(out), "--device", "cpu", *budget, *SMALL])
    assert not left.value.code
    return out


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file with enough text for a few short windows."""
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    return file


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[Path]:
    """An output directory; neither it nor anything beside it may exist after the test."""
    out = tmp_path / "result" / "out"
    out.parent.mkdir()
    yield out
    left = sorted(path.name for path in out.parent.iterdir())
    assert left == [], f"left behind: {left}"
