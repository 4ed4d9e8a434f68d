"""Where a result comes from: versions, hardware, date, commit, seed, and fingerprints of weights and text."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffsplit.errors import ModelError

_PACKAGES = ("ffsplit", "torch", "transformers", "safetensors", "numpy")
_PIECE_BYTES = 1 << 20
_PIECES_PER_TENSOR = 4
FULL_HASH_BYTES = 8 << 30


def provenance(
    model: nn.Module | None = None, seed: int | None = None, data: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A JSON-able record to store with a result.

    Args:
        model: its class, configuration's name and :func:`hash_model` are recorded.
        seed: of the run.
        data: names and hashes of the text, recorded as they are.

    Returns:
        ``versions``, ``hardware``, ``platform``, ``date`` (UTC, ISO 8601), ``commit`` (of ffsplit; ``None`` unless it
        runs from its own git checkout; with ``+changes`` if tracked files differ from it), ``seed``, ``data`` and
        ``model``.
    """
    return {
        "versions": versions(),
        "hardware": hardware(),
        "platform": platform.platform(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _own_commit(),
        "seed": seed,
        "data": None if data is None else dict(data),
        "model": None if model is None else _model_record(model),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages a result depends on; ``None`` for one that is not installed."""
    found = {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    # What is installed may leave out the build, "+cpu" or "+cu130", which results depend on.
    return found | {"torch": str(torch.__version__)}


def hardware() -> dict[str, Any]:
    """Processor, memory and accelerator of this machine."""
    return {
        "cpu": _cpu_name(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "accelerator": _accelerator_name(),
        "accelerators": torch.accelerator.device_count(),
    }


@functools.cache
def _own_commit() -> str | None:
    """The commit of this package, looked up once: the code that runs stays what it was when it was loaded."""
    return git_commit(Path(__file__).resolve().parents[2])


def git_commit(root: Path) -> str | None:
    """The commit checked out in ``root`` if ffsplit's sources lie there, else ``None``."""
    if not (root / ".git").exists() or not (root / "src" / "ffsplit").is_dir():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit}+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit


def hash_model(model: nn.Module) -> str:
    """A fingerprint of the names, types, shapes and values in a model's state dict.

    Up to 8 GiB every byte is hashed, and the result starts with ``sha256:``. Above that, a tensor of more than 4 MiB
    gives four pieces of 1 MiB, at its start, its end and evenly between, and the result starts with
    ``sha256-sampled:``: it tells checkpoints of different training apart, but a change outside the pieces goes unseen.
    The device, the order of registration and whether equal tensors are tied make no difference.

    Raises:
        ModelError: a tensor is on the meta device, so it has no values.
    """
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    sampled = sum(tensor.nbytes for tensor in state.values()) > FULL_HASH_BYTES
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        if tensor.is_meta:
            raise ModelError(f"{name}: is on the meta device and has no values to hash")
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        content = tensor.contiguous().reshape(-1).view(torch.uint8)
        for piece in _pieces(content, sampled):
            digest.update(piece.cpu().numpy().data)
    return f"{'sha256-sampled' if sampled else 'sha256'}:{digest.hexdigest()}"


def _pieces(content: Tensor, sampled: bool) -> list[Tensor]:
    """The bytes to hash: all of them, or a few pieces of a large tensor."""
    size = content.numel()
    if not sampled or size <= _PIECES_PER_TENSOR * _PIECE_BYTES:
        return [content]
    starts = [index * (size - _PIECE_BYTES) // (_PIECES_PER_TENSOR - 1) for index in range(_PIECES_PER_TENSOR)]
    return [content[start : start + _PIECE_BYTES] for start in starts]


def _model_record(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return {
        "class": type(model).__name__,
        "name": getattr(config, "name_or_path", None) or None,
        "hash": hash_model(model),
    }


@functools.cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    """Cores this process may run on; a container often grants fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _accelerator_name() -> str | None:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return None
    module = torch.get_device_module(device)
    return str(module.get_device_name()) if hasattr(module, "get_device_name") else device.type


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
