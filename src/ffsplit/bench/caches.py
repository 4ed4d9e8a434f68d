"""How large the last cache before memory is, and getting weights out of it, as a model's other layers do."""

from __future__ import annotations

from pathlib import Path

import torch

SYSTEM = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_BYTES = 64 << 20
MOST_BYTES = 512 << 20
"""More is not read to empty a cache: a large shared one never belongs to one process."""
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_cache_bytes(device: torch.device, system: Path = SYSTEM) -> int:
    """Bytes of the last cache before memory; 64 MiB where the system does not tell."""
    if device.type == "cpu":
        sizes = [_bytes(file.read_text().strip()) for file in system.glob("index*/size")]
        return max(sizes, default=UNKNOWN_BYTES)
    module = torch.get_device_module(device)
    if not hasattr(module, "get_device_properties"):
        return UNKNOWN_BYTES
    return int(getattr(module.get_device_properties(device), "L2_cache_size", 0)) or UNKNOWN_BYTES


def cold_bytes(device: torch.device) -> int:
    """Bytes to go through until nothing of what was there before is left in the cache: 1.5 times its size."""
    return min(3 * last_cache_bytes(device) // 2, MOST_BYTES)


class Flush:
    """Empties the last cache by reading and writing a buffer of one and a half times its size."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.zeros(cold_bytes(device) // 4, dtype=torch.float32, device=device)

    def __call__(self) -> None:
        self._buffer.add_(1.0)


def _bytes(text: str) -> int:
    """``266240K`` as a number."""
    return int(text[:-1]) * _UNITS[text[-1]] if text[-1:] in _UNITS else int(text or 0)
