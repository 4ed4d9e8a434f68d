"""Bytes that modules hold and that work needs while it runs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffsplit.evaluate.size import unique_bytes
from ffsplit.ffn.merged import MergedCache
from ffsplit.ffn.watched import WatchedBranches
from ffsplit.kernels.cache import DerivedCache
from ffsplit.kernels.cpu_int8 import FewInt8Matrix

CACHES = DerivedCache, MergedCache, WatchedBranches
"""What kernels keep of a projection, or of a whole sum."""
_PROCESS = Path("/proc/self")


def resident_bytes(module: nn.Module) -> int:
    """Bytes of the distinct storages that a module holds: parameters, buffers, and whatever its kernels keep beside."""
    held = {id(one): one for part in module.modules() for one in _held(vars(part))}.values()
    tensors = [one for one in held if isinstance(one, Tensor)]
    # The layouts of oneDNN and fbgemm show no storage.
    opaque = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_mkldnn)
    opaque += sum(one.nbytes for one in held if isinstance(one, FewInt8Matrix))
    return opaque + unique_bytes(tensor for tensor in tensors if not tensor.is_mkldnn)


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a module's state dict: what a checkpoint stores and a forward has to read."""
    return unique_bytes(value for value in module.state_dict().values() if isinstance(value, Tensor))


def extra_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that work takes beyond what was taken before it; ``None`` where no system counter tells.

    On an accelerator torch's own count, on Linux the resident set of the process (in pages, so small work takes 0).
    There, with glibc, what was freed and is still resident goes back to the system first: work that takes such memory
    again is seen to take it. Other allocators may hide that part.
    """
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        work()
        torch.accelerator.synchronize(device)
        return max(0, torch.accelerator.max_memory_allocated(device) - before)
    if not _PROCESS.is_dir():
        return None
    _give_back_freed()
    try:
        (_PROCESS / "clear_refs").write_text("5")  # sets the peak to what is resident now
        before = _kilobytes("VmRSS")
        work()
        return 1024 * max(0, _kilobytes("VmHWM") - before)
    except (OSError, KeyError):
        return None


def _give_back_freed() -> None:
    """Let glibc return the free pages of its heaps to the system; other C libraries know no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _kilobytes(name: str) -> int:
    lines = (line.split() for line in (_PROCESS / "status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}[name]


def _held(value: Any) -> Iterator[Tensor | FewInt8Matrix]:
    if isinstance(value, Tensor | FewInt8Matrix):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _held(inner)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from _held(inner)
    elif isinstance(value, CACHES) or (is_dataclass(value) and not isinstance(value, type)):
        yield from _held(vars(value))
