"""The journal of a running compression: finished FFNs on disk, so that a killed run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ffsplit.errors import ResumeError
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.files import JOURNAL, claim_directory, read_json, whole_file, write_whole


def fingerprint(parts: dict[str, Any]) -> str:
    """A digest of everything that a resumed run must share with the killed one."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def sum_state(module: SumFFN) -> dict[str, torch.Tensor]:
    """The tensors of a sum, without those of its activation module, which the model's family provides."""
    return {name: tensor for name, tensor in module.state_dict().items() if ".act." not in name}


class Journal:
    """A directory with one safetensors file per finished FFN and the identity of the run.

    Args:
        directory: created if missing.
        identity: what the run depends on (recipe, model, data, versions); a journal of another identity is refused.

    Raises:
        ResumeError: the directory holds a journal of another run, or a damaged one.
    """

    def __init__(self, directory: str | Path, identity: dict[str, Any]) -> None:
        self.directory = Path(directory)
        claim_directory(self.directory / JOURNAL, json.loads(json.dumps(identity, default=str)), "run")

    def _file(self, index: int) -> Path:
        return self.directory / f"ffn-{index:04d}.safetensors"

    def has(self, index: int) -> bool:
        return self._file(index).exists()

    @property
    def finished(self) -> int:
        """FFNs on disk."""
        return len(list(self.directory.glob("ffn-*.safetensors")))

    def store(self, index: int, module: SumFFN, notes: dict[str, Any]) -> None:
        """Write one finished FFN; it appears whole or not at all."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in sum_state(module).items()}
        metadata = {"spec": module.spec.model_dump_json(), "notes": json.dumps(notes)}
        with whole_file(self._file(index)) as partial:
            save_file(tensors, partial, metadata=metadata)

    def load(self, index: int, act: nn.Module, dtype: torch.dtype) -> tuple[SumFFN, dict[str, Any]]:
        """Read one finished FFN and its notes.

        Raises:
            ResumeError: the file is damaged.
        """
        file = self._file(index)
        try:
            with safe_open(file, framework="pt") as stored:
                metadata = stored.metadata()
                state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ResumeError(f"{file} is damaged ({error}); remove it to fit that FFN again") from error
        module = SumFFN.empty(SumSpec.model_validate_json(metadata["spec"]), act, dtype, "cpu")
        module.load_state_dict({**module.state_dict(), **state})
        module.requires_grad_(False)
        return module, json.loads(metadata["notes"])

    def folder(self, name: str) -> Path:
        """A directory inside the journal for measurements that a resumed run shall not repeat."""
        folder = self.directory / name
        folder.mkdir(exist_ok=True)
        return folder

    def keep(self, name: str, content: Any) -> None:
        """Write plain values as JSON; they appear whole or not at all."""
        write_whole(self.directory / f"{name}.json", json.dumps(content, indent=1))

    def kept(self, name: str) -> Any | None:
        """What :meth:`keep` wrote under a name, or None.

        Raises:
            ResumeError: the file is damaged.
        """
        file = self.directory / f"{name}.json"
        return read_json(file, "remove the directory to start afresh") if file.exists() else None

    def remove(self) -> None:
        """Delete the journal: the result is safe elsewhere."""
        shutil.rmtree(self.directory, ignore_errors=True)
