"""Where modules and tensors stand in other modules, so that replaced ones are noticed at every forward.

A place is a dictionary of a module and a key in it: looking there takes a tenth of the time of an attribute of a
module, and a decoded token has little.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

Place = tuple[dict[str, Any], str]
Held = tuple[dict[str, Any], str, Any]
"""A place, and what stood there."""


def held_at(places: Sequence[Place]) -> tuple[Held, ...]:
    """Places with what stands there now; None where nothing does."""
    return tuple((where, name, where.get(name)) for where, name in places)


def is_unchanged(held: Sequence[Held]) -> bool:
    """Whether all that stood there still does."""
    return all(where.get(name) is it for where, name, it in held)


def tensors_at(places: Iterable[Place | None]) -> list[Tensor | None]:
    """The tensors that stand there."""
    return [None if place is None else place[0][place[1]] for place in places]
