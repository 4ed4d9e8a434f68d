"""Progress of long work on stderr: a bar on a terminal, plain lines with the time elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ffsplit.cli.console import console, say

Report = Callable[[str, int, int], None]
LINE_SECONDS = 10.0
STEPS = ("capture ", "advance ")


@contextmanager
def reporting() -> Iterator[Report]:
    """What long work calls with (what, done, total)."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield Lines()
        return
    with _bars(screen) as bars:
        yield Bars(bars)


def _bars(screen: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=screen, transient=True)


class Bars:
    """One bar for every kind of work under way; a finished one goes away."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, label: str, done: int, total: int) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
        self._bars.update(self._tasks[label], completed=done, total=total)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(label))


class Lines:
    """A line at the end of every stage, and at most one in ten seconds in between.

    Steps inside a stage (``capture model.layers.3``) follow each other by the dozen, so the end of one is only worth a
    line when the last line is long ago.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, write: Callable[[str], None] = say) -> None:
        self._clock = clock
        self._write = write
        self._last = clock()

    def __call__(self, label: str, done: int, total: int) -> None:
        stage_ended = done >= total and not label.startswith(STEPS)
        if not stage_ended and self._clock() - self._last < LINE_SECONDS:
            return
        self._last = self._clock()
        self._write(f"{datetime.now():%H:%M:%S} {label}: {done} of {total}")
