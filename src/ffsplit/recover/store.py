"""What a killed recovery leaves, so that repeating it goes on: finished stages, and the state of the one under way."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ffsplit.errors import ResumeError

_IDENTITY = "recovery.json"


class Store:
    """A directory of safetensors and JSON files, each of which appears whole or not at all.

    Args:
        directory: made if missing.
        parts: what the run depends on; the directory of another run is refused.
        writes: whether this process writes.

    Raises:
        ResumeError: the directory holds another run, or a damaged one.
    """

    def __init__(self, directory: Path, parts: dict[str, Any], writes: bool = True) -> None:
        self.directory, self.writes = directory, writes
        known = json.dumps(parts, sort_keys=True, indent=1)
        self.identity = hashlib.sha256(known.encode()).hexdigest()
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / _IDENTITY
        if file.exists():
            found = _read_json(file)
            if found != parts:
                differing = sorted(key for key in parts if not isinstance(found, dict) or found.get(key) != parts[key])
                raise ResumeError(
                    f"{directory} belongs to a recovery with other {', '.join(differing)}; remove it to start afresh, "
                    "or repeat the interrupted command"
                )
        elif writes:
            write_whole(file, known.encode())

    def state(self, name: str) -> Path:
        """The file for the state of a training under way."""
        return self.directory / f"{name}-state.safetensors"

    def finish(self, name: str, module: nn.Module, notes: dict[str, Any]) -> None:
        """Keep a finished module and its notes."""
        if not self.writes:
            return
        # Tied weights have several names and one storage, which safetensors refuses: the first name is enough.
        tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for key, tensor in module.state_dict().items():
            if not tensor.numel() or tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            tensors[key] = tensor.detach().cpu().contiguous()
        file = self._done(name)
        partial = file.with_suffix(".partial")
        save_file(tensors, partial, metadata={"notes": json.dumps(notes)})
        os.replace(partial, file)

    def holds(self, name: str) -> bool:
        """Whether a module was finished in an earlier run."""
        return self._done(name).exists()

    @torch.no_grad()
    def finished(self, name: str, module: nn.Module) -> dict[str, Any] | None:
        """Put a finished module's tensors into this one and give its notes; None if it is not finished.

        Raises:
            ResumeError: the file is damaged or does not fit.
        """
        file = self._done(name)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                notes: dict[str, Any] = json.loads((stored.metadata() or {})["notes"])
                have = module.state_dict()
                for key in stored.keys():  # noqa: SIM118 - not a mapping
                    have[key].copy_(stored.get_tensor(key))
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ResumeError(f"{file} is damaged ({error}); remove it to do that part again") from error
        return notes

    def _done(self, name: str) -> Path:
        return self.directory / f"{name}-done.safetensors"


def write_whole(file: Path, content: bytes) -> None:
    """Write a file; it appears whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, file)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResumeError(f"{file} is damaged ({error}); remove the directory to start afresh") from error
