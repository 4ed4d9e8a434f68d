"""What planners that choose a width for every FFN have in common."""

from __future__ import annotations

from typing import Any

from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.prune import PruneConfig


def pruned_to(width: int, shape: FFNShape, **settings: Any) -> PruneConfig:
    """Pruning to a width; an FFN that keeps all of its neurons stays as it is, to the bit."""
    if width == shape.d_ff:
        return PruneConfig(keep=1.0, **settings)
    return PruneConfig(width=width, **settings)
