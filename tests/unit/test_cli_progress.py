"""Progress: few plain lines in a log, bars on a terminal; and which failures end in which exit code."""

from __future__ import annotations

import errno
import io

import pytest
import typer
from rich.console import Console
from safetensors import SafetensorError

from ffsplit.cli.guard import guarded
from ffsplit.cli.progress import Bars, Lines, _bars
from ffsplit.errors import ModelError
from ffsplit.plain import plain


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_at_stage_ends_and_every_ten_seconds() -> None:
    clock, lines = Clock(), list[str]()
    report = Lines(clock, lines.append)
    for done in range(1, 101):
        clock.now += 0.5
        report("capture model.layers.0", done, 100)
    assert len(lines) == 5
    report("capture model.layers.1", 3, 3)
    assert len(lines) == 5
    report("perplexity", 3, 4)
    report("perplexity", 4, 4)
    assert len(lines) == 6
    assert lines[-1].endswith(" perplexity: 4 of 4")


def test_bars_appear_and_go_away() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    with _bars(screen) as bars:
        report = Bars(bars)
        report("fit", 1, 30)
        report("capture model.layers.1", 1, 2)
        assert [task.description for task in bars.tasks] == ["fit", "capture model.layers.1"]
        report("capture model.layers.1", 2, 2)
        report("fit", 2, 30)
        assert [(task.description, task.completed) for task in bars.tasks] == [("fit", 2)]


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [
        (ModelError("layer 3 is odd"), 2, "layer 3 is odd"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "no space left"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 2, "no space left"),
        (SafetensorError("Error while deserializing header"), 2, "damaged or cut off"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_with_an_exit_code(
    failure: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as left, guarded():
        raise failure
    assert left.value.exit_code == code
    assert words in capsys.readouterr().err


def test_other_failures_pass_through_with_a_note() -> None:
    with pytest.raises(OSError, match="Input/output") as left, guarded():
        raise OSError(errno.EIO, "Input/output error")
    assert "report it" in left.value.__notes__[0]
    with pytest.raises(BrokenPipeError) as pipe, guarded():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert not hasattr(pipe.value, "__notes__")


def test_plain_values_have_no_nan() -> None:
    assert plain({"a": float("nan"), "b": (1, float("inf")), 3: None, "c": True}) == {
        "a": None,
        "b": [1, None],
        "3": None,
        "c": True,
    }
