"""Where modules and tensors stand in other modules, so that replaced ones are noticed at every forward.

A place is a dictionary of a module and a key in it: looking there takes a tenth of the time of an attribute of a
module, and a decoded token has little. All places are looked at in one go, with nothing of Python between two of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

from torch import Tensor

Place = tuple[dict[str, Any], str]


@dataclass(frozen=True)
class Held:
    """Places, and what stood there: three columns of one length.

    Attributes:
        dictionaries: of modules.
        keys: in them.
        things: that stood there, None where nothing did.
    """

    dictionaries: tuple[dict[str, Any], ...] = ()
    keys: tuple[str, ...] = ()
    things: tuple[Any, ...] = ()

    @classmethod
    def at(cls, places: Sequence[Place]) -> Held:
        """What stands there now."""
        return cls(
            tuple(where for where, _ in places),
            tuple(key for _, key in places),
            tuple(where.get(key) for where, key in places),
        )

    def is_unchanged(self) -> bool:
        """Whether all that stood there still does."""
        return all(map(is_, map(dict.get, self.dictionaries, self.keys), self.things))


def tensors_at(places: Iterable[Place | None]) -> list[Tensor | None]:
    """The tensors that stand there."""
    return [None if place is None else place[0][place[1]] for place in places]
