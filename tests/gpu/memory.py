"""Memory that shows what was never written."""

from __future__ import annotations

import torch


def poison() -> None:
    """Memory that the next allocations get is NaN."""
    for size in (1 << 10, 1 << 12, 1 << 16, 1 << 20, 1 << 24):
        torch.full((size,), float("nan"), device="cuda")
