"""The tensors that an operation of a dispatch mode takes or returns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def operands(arguments: Iterable[Any]) -> list[Tensor]:
    """All tensors among an operation's arguments, in order, those in lists and tuples included.

    Operations take and return nothing that is nested deeper or in another way; flattening any tree would cost more
    than the operations of a tiny model do.
    """
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, list | tuple):
            found += operands(argument)
    return found
