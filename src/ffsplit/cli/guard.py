"""From exceptions to exit codes: 2 for what the user can put right, 130 or 143 for an interruption, 1 for a bug."""

from __future__ import annotations

import errno
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from ffsplit.cli.console import debugging, say
from ffsplit.errors import FFSplitError

REFUSED, INTERRUPTED, TERMINATED = 2, 130, 143
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as slurm and ``docker stop`` send it: whatever cleans up after Ctrl-C does so after this."""


class GuardedGroup(TyperGroup):
    """A group of commands whose failures end in a readable message and the right exit code."""

    def invoke(self, ctx: Any) -> Any:
        with guarded(), terminable():
            return super().invoke(ctx)


@contextmanager
def terminable() -> Iterator[None]:
    """Raise :class:`Terminated` at SIGTERM, once: a second one does not disturb the cleaning up.

    Only the main thread can do so, and no handler is touched that Python does not know or that ignores the signal.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


@contextmanager
def guarded() -> Iterator[None]:
    """Turn deliberate refusals, a full disk, Ctrl-C and SIGTERM into ``typer.Exit``; a bug keeps its traceback.

    Raises:
        typer.Exit: code 2 after a refusal, 130 after an interruption, 143 after a termination.
    """
    try:
        yield
    except FFSplitError as error:
        _refuse(str(error), error)
    except Terminated:
        say("terminated")
        raise typer.Exit(TERMINATED) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if _disk_is_full(error):
            _refuse(f"no space left on the disk ({error}); free some, or write elsewhere", error)
        if type(error).__name__ == "SafetensorError":  # by name: importing safetensors takes longer than printing help
            _refuse(f"a safetensors file is damaged or cut off: {error}", error)
        if not _belongs_to_parser(error):
            error.add_note("ffsplit does not foresee this error: please report it with the lines above.")
        raise


def _refuse(message: str, error: Exception) -> None:
    if debugging():
        say("".join(traceback.format_exception(error)))
    say(f"{typer.style('error:', fg='red', bold=True)} {message}")
    raise typer.Exit(REFUSED) from None


def _disk_is_full(error: Exception) -> bool:
    """Whether writing failed for lack of space; safetensors has an error of its own for that, without a number."""
    number = f"os error {errno.ENOSPC}"
    return (isinstance(error, OSError) and error.errno in _DISK_FULL) or number in str(error)


def _belongs_to_parser(error: Exception) -> bool:
    """Whether the command line's parser raised it, which has its own messages and exit codes."""
    pipe_closed = isinstance(error, OSError) and error.errno == errno.EPIPE
    return pipe_closed or isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "format_message")
