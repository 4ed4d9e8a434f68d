"""The same module in a model with and without a head: its path has a prefix in one and none in the other."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def renamings(model: nn.Module) -> tuple[Callable[[str], str], ...]:
    """From a stored path to what a model may call it: as it is, without and with the base model's prefix."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return lambda path: path, lambda path: path.removeprefix(prefix), lambda path: prefix + path


def spellings(model: nn.Module, path: str) -> tuple[str, ...]:
    """A path as it is, and as a model without and with a head spells it."""
    return tuple(rename(path) for rename in renamings(model))


def has_module(model: nn.Module, path: str) -> bool:
    """Whether there is a module of that path."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
