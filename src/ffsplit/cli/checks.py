"""Refusals that cost nothing: made before a model or the numerical libraries are loaded, wherever that is possible."""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffsplit.cli.ours import MARK, check_ours
from ffsplit.errors import CheckpointError, ModelError, RecipeError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")
NAME_ROOM = 20
"""What is added to the output's name for the journal and for what is under way."""

START = 1024
"""Bytes of a file in which it says what it is."""


def check_budget(
    keep: float | None,
    bits: float | None,
    sparsity: float | None = None,
    budgets: Sequence[str] = (),
    *,
    front: bool = False,
) -> None:
    """At most one budget, in range; what those in words mean is looked at later. A front takes several, in words.

    Raises:
        RecipeError: several are given, or one is out of range.
    """
    given = [name for name, value in (("keep", keep), ("bits", bits), ("sparsity", sparsity)) if value is not None]
    if len(given) > 1 or (given and budgets):
        options = [f"--{name}" for name in given] + [f"--budget {words}" for words in budgets]
        raise RecipeError(f"give one budget, {' or '.join(options)}, not both")
    if front and given:
        raise RecipeError(f"--pareto takes its budgets in words: --budget {given[0]}=VALUE, as many as wanted")
    if len(budgets) > 1 and not front:
        options = [f"--budget {words}" for words in budgets]
        raise RecipeError(f"{' '.join(options)}: one checkpoint has one budget; --pareto takes several")
    if keep is not None and not 0 < keep <= 1:
        raise RecipeError(f"--keep {keep}: must be above 0 and at most 1 (share of the FFN parameters that stay)")
    if bits is not None and not 0 < bits <= 16:
        raise RecipeError(f"--bits {bits}: must be above 0 and at most 16 (stored bits per FFN weight)")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise RecipeError(f"--sparsity {sparsity}: must be at least 0 and below 1 (share of work left out at run time)")


def names(listed: str | None) -> list[str]:
    """The names of a list such as ``a,b,c``.

    Raises:
        RecipeError: there is none in it.
    """
    found = [] if listed is None else [name.strip() for name in listed.split(",") if name.strip()]
    if listed is not None and not found:
        raise RecipeError(f"--methods {listed!r}: name at least one method, such as prune,quantize")
    return found


def check_output(out: Path, *, overwrite: bool | None = None, mark: str = MARK) -> None:
    """The output directory can be made, and nothing of value is in its place.

    Args:
        out: the directory to be.
        overwrite: an earlier output may be replaced; a directory of another kind, or with other files in it, never is.
            None: the command has no such option.
        mark: the file that tells an earlier output from other directories.

    Raises:
        CheckpointError: it exists and may not or cannot be replaced, or its parent cannot be written to.
    """
    _check_name(out, "directory")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} exists and is not a directory")
    if out.resolve().is_mount():  # the finished directory takes its place by a rename, which a mount point refuses
        raise CheckpointError(f"{out} is a mount point, which cannot be replaced; name a directory in it")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            way = "" if overwrite is None else ", or give --overwrite"
            raise CheckpointError(f"{out} exists and is not empty; choose another directory{way}")
        check_ours(out, mark)
    check_writable(out.resolve().parent)


def check_file(file: Path, sign: str, kind: str) -> None:
    """A file can be written, and nothing of value is in its place.

    Args:
        file: to be.
        sign: what every earlier one has in its first lines, to tell it from other files.
        kind: what such a file is, for the message.

    Raises:
        CheckpointError: another file is there, or its directory cannot be written to.
    """
    _check_name(file, "file")
    if file.exists() and not file.is_file():
        raise CheckpointError(f"{file} exists and is not a file")
    if file.is_file() and (start := _start(file)) and sign.encode() not in start:
        raise CheckpointError(f"{file} exists and is not {kind}, so it will not be replaced; choose another name")
    check_writable(file.resolve().parent)


def _start(file: Path) -> bytes:
    try:
        with file.open("rb") as stored:
            return stored.read(START)
    except OSError as error:
        raise CheckpointError(f"{file} exists and cannot be read: {error.strerror or error}") from error


def _check_name(path: Path, what: str) -> None:
    """The file system has no objection to a name, with what is added to it while it is written."""
    try:
        place = path.resolve()
        os.stat(place.with_name(f".{place.name}.{'x' * NAME_ROOM}")) if place.name else None
    except (FileNotFoundError, NotADirectoryError):
        pass  # the name itself is possible; where it would lie is looked at elsewhere
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{_short(path)}: no {what} can be made there: {reason}") from error


def _short(path: Path) -> str:
    spelt = str(path)
    return spelt if len(spelt) <= 100 else f"{spelt[:40]}...{spelt[-40:]}"


def check_writable(directory: Path) -> None:
    """A file can be made in a directory, or in the nearest one above it that exists.

    Raises:
        CheckpointError: it cannot; the message says where and why.
    """
    while not directory.exists():
        directory = directory.parent
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file, so nothing can be written below it")
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written to: {error.strerror or error}") from error


def check_model_name(name: str) -> None:
    """Something that was spelt like a path exists; whether it holds a model is seen when it is opened.

    Raises:
        ModelError: there is no such path; the message names the nearest one.
    """
    path = Path(name).expanduser()
    if any(len(part) > 255 for part in path.parts):
        raise ModelError(f"model {_short(path)}: a name of more than 255 characters is no file, folder or hub id")
    if path.exists() or not (name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix == ".gguf"):
        return
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"; did you mean {str(path.parent / close[0])!r}?" if close else ""
    raise ModelError(f"model {name!r}: no such file or folder{hint}")


def check_text(source: str, field: str | None, split: str) -> None:
    """A source exists and has text in it; only its first document is read.

    Raises:
        DataError: it is missing, empty, damaged, or has no such field.
    """
    from ffsplit.calibrate.sources import load_texts

    load_texts(source, field, "evaluation" if split == "evaluation" else "calibration", max_characters=1)


def stored_config(directory: str) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint folder; empty for anything else, which is looked at later.

    Raises:
        ModelError: the file is not JSON.
    """
    file = Path(directory).expanduser() / "config.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: is not valid JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of a name.

    Raises:
        RecipeError: it is none of those that weights are loaded in.
    """
    if name is not None and name not in DTYPES:
        close = difflib.get_close_matches(name, DTYPES, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"--dtype {name!r}: must be one of {', '.join(DTYPES)}{hint}")
    if name is None:
        return None
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def torch_device(name: str | None) -> torch.device:
    """The device of a name; an accelerator if there is one, when none is given.

    Raises:
        RecipeError: it is not spelt like a device, or this machine has no such one.
    """
    from ffsplit.devices import device_of

    return device_of(name, "--device")
