"""What the command line says about journals of interrupted runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ffsplit.cli.console import say
from ffsplit.files import IDENTITIES


@contextmanager
def resumable(journal: Path) -> Iterator[None]:
    """Say what an earlier run left, and after an interruption what this one leaves: nothing, if nothing was done."""
    if finished := _finished(journal):
        say(f"resuming: {finished} FFNs are done already ({journal})")
    elif _worth_keeping(journal):
        say(f"resuming: what an earlier run measured or trained is there already ({journal})")
    try:
        yield
    except BaseException as error:
        if not _worth_keeping(journal):
            shutil.rmtree(journal, ignore_errors=True)
        elif isinstance(error, KeyboardInterrupt):
            say(f"what is finished is kept in {journal}: repeat the same command to go on")
        raise


def _finished(journal: Path) -> int:
    return len(list(journal.rglob("ffn-*.safetensors")))


def _worth_keeping(journal: Path) -> bool:
    """Whether there is anything but the identities of runs: finished FFNs, a training, a planner's measurements."""
    return any(file.is_file() and file.name not in IDENTITIES for file in journal.rglob("*"))
