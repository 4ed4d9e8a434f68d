"""Hooks on modules whose own forwards would not be called."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def have_hooks(modules: Iterable[nn.Module | None]) -> bool:
    """Whether a forward hook is on any of these, or on all modules there are."""
    everywhere = nn.modules.module
    return bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks) or any(
        module is not None and (module._forward_hooks or module._forward_pre_hooks) for module in modules
    )
