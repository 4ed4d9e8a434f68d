"""A model's module tree in a few lines, for messages."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from torch import nn


def module_tree(model: nn.Module, lines: int = 60) -> str:
    """Class names and parameter shapes, equal neighbours folded into one, cut after ``lines`` lines."""
    text = list(_lines([("", model)]))
    if len(text) > lines:
        text = [*text[: lines - 1], f"... {len(text) - lines + 1} more lines"]
    return "\n".join(text)


def _lines(siblings: list[tuple[str, nn.Module]], indent: str = "") -> Iterator[str]:
    for _, group in groupby(siblings, key=lambda item: _signature(item[1])):
        names, modules = zip(*group, strict=True)
        label = f"{names[0]}: " if len(names) == 1 else f"{names[0]}..{names[-1]}: {len(names)} x "
        shapes = ", ".join(f"{key} {list(p.shape)}" for key, p in modules[0].named_parameters(recurse=False))
        yield f"{indent}{label if names[0] else ''}{type(modules[0]).__name__}{f'({shapes})' if shapes else ''}"
        yield from _lines(list(modules[0].named_children()), indent + "  ")


def _signature(module: nn.Module) -> tuple[object, ...]:
    """Equal for modules of the same structure and sizes."""
    return (
        type(module).__qualname__,
        *((name, tuple(p.shape)) for name, p in module.named_parameters()),
        *((name, type(child).__qualname__) for name, child in module.named_modules()),
    )
