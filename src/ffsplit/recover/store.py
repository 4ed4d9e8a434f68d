"""What a killed recovery leaves, so that repeating it goes on: finished stages, and the state of the one under way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ffsplit.errors import ResumeError
from ffsplit.files import RECOVERY, claim_directory, whole_file


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
        self.identity = hashlib.sha256(json.dumps(parts, sort_keys=True, indent=1).encode()).hexdigest()
        claim_directory(directory / RECOVERY, parts, "recovery", writes=writes)

    def state(self, name: str) -> Path:
        """The file for the state of a training under way."""
        return self.directory / f"{name}-state.safetensors"

    def finish(self, name: str, module: nn.Module, notes: dict[str, Any]) -> None:
        """Keep a finished module and its notes, which makes the state of its training needless."""
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
        with whole_file(self._done(name)) as partial:
            save_file(tensors, partial, metadata={"notes": json.dumps(notes)})
        self.state(name).unlink(missing_ok=True)

    def holds(self, name: str) -> bool:
        """Whether a module was finished in an earlier run."""
        return self._done(name).exists()

    @torch.no_grad()
    def finished(
        self, name: str, module: nn.Module, shape: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any] | None:
        """Put a finished module's tensors into this one and give its notes; None if it is not finished.

        Args:
            name: it was kept by.
            module: to put them into.
            shape: gives the module the finished one's structure, of which the notes tell; None: it has that.

        Raises:
            ResumeError: the file is damaged or does not fit.
        """
        file = self._done(name)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                notes: dict[str, Any] = json.loads((stored.metadata() or {})["notes"])
                if shape is not None:
                    shape(notes)
                have = module.state_dict()
                for key in stored.keys():  # noqa: SIM118 - not a mapping
                    have[key].copy_(stored.get_tensor(key))
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ResumeError(f"{file} is damaged ({error}); remove it to do that part again") from error
        return notes

    def _done(self, name: str) -> Path:
        return self.directory / f"{name}-done.safetensors"
