"""Where words go: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import Any

import typer
from rich.console import Console

from ffsplit.plain import plain

PLAIN_WIDTH = 120


def debugging() -> bool:
    """Whether tracebacks and the logs of other libraries are wanted (``FFSPLIT_DEBUG=1``)."""
    return os.environ.get("FFSPLIT_DEBUG", "") not in ("", "0")


def console(*, stderr: bool = False) -> Console:
    """A console on the current stdout or stderr; wide where it is not a terminal, so that logs stay readable."""
    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = PLAIN_WIDTH
    return made


def say(message: str) -> None:
    """A line for the user on stderr."""
    typer.echo(message, err=True)


def print_json(document: Mapping[str, Any] | list[Any]) -> None:
    """One JSON document on stdout; numbers that are not finite become null."""
    typer.echo(json.dumps(plain(document), indent=2, allow_nan=False))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep stdout for results while work is done, and keep other libraries' advice out of sight.

    Whatever is printed inside goes to stderr; transformers' progress bars and logs below errors are off, unless
    ``FFSPLIT_DEBUG`` is set; ffsplit's own warnings are shown.
    """
    handler = _ToStderr(logging.WARNING)
    logger = logging.getLogger("ffsplit")
    logger.addHandler(handler)
    try:
        with redirect_stdout(sys.stderr):
            if debugging():
                yield
            else:
                with _quiet_transformers():
                    yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging as advice

    verbosity, bars = advice.get_verbosity(), advice.is_progress_bar_enabled()
    bar = gguf.tqdm  # the one bar that does not ask the settings
    advice.set_verbosity_error()
    advice.disable_progress_bar()
    gguf.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        gguf.tqdm = bar
        advice.set_verbosity(verbosity)
        if bars:
            advice.enable_progress_bar()


class _ToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}")
