"""What a kernel makes of a stored matrix, kept beside it until the stored tensors change."""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from operator import attrgetter, is_
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")
State = tuple[tuple[int, ...], tuple[int, ...]]
_version_of = attrgetter("_version")
SHARE_OF_MEMORY = 0.25
"""Of a device's memory, which decoded matrices may fill unless :func:`set_decoded_limit` was told otherwise."""


def state_of(tensors: Sequence[Tensor]) -> State:
    """What tells that one was changed: the version, and the address, which assigning to ``.data`` changes alone."""
    return tuple(map(_version_of, tensors)), tuple(map(Tensor.data_ptr, tensors))


class DerivedCache:
    """Whatever was made from stored tensors, under a key for each kind of it, made when it is first asked for.

    Tensors that were replaced, or changed in place, are noticed; after a cast or a move of the module, whoever does it
    calls :meth:`drop`. Copies and pickles are empty, and nothing here is in any ``state_dict``.
    """

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Forget everything; what is asked for next is made anew."""
        self._sources: tuple[Tensor, ...] = ()
        self._state: State = ((), ())
        self._made: dict[Hashable, Any] = {}

    def forget(self, key: Hashable) -> None:
        """Forget what was made under a key, if anything was."""
        self._made.pop(key, None)

    def get(self, key: Hashable, sources: Sequence[Tensor | None], make: Callable[[], T]) -> T:
        """What ``make`` returns, or returned when it was last called with this key and these very tensors.

        Args:
            key: what is made: a name, a dtype, whatever else than the sources it depends on.
            sources: the tensors that it is made from, no inference tensors (their changes cannot be seen).
            make: makes it.
        """
        self._look_at(sources)
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])

    def holds(self, key: Hashable, sources: Sequence[Tensor | None]) -> bool:
        """Whether it is there and still right."""
        self._look_at(sources)
        return key in self._made

    def has_room(self, key: Hashable, sources: Sequence[Tensor | None], size: int) -> bool:
        """Whether it is there and still right, or so many bytes of a decoded matrix may be kept beside its sources."""
        device = next(source.device for source in sources if source is not None)
        return self.holds(key, sources) or size <= decoded_room(device)

    @property
    def is_empty(self) -> bool:
        return not self._made

    def _look_at(self, sources: Sequence[Tensor | None]) -> None:
        """Forget what was made from other tensors than these, or from these before they were changed."""
        present = tuple(source for source in sources if source is not None)
        state = state_of(present)
        same = len(present) == len(self._sources) and all(map(is_, present, self._sources))
        if not same or state != self._state:
            self.drop()
            self._sources, self._state = present, state

    def __deepcopy__(self, memo: dict[int, Any]) -> DerivedCache:
        return DerivedCache()

    def __reduce__(self) -> tuple[type[DerivedCache], tuple[()]]:
        return DerivedCache, ()


class _Decoded:
    """Bytes of the decoded matrices that this process keeps, by device."""

    kept: ClassVar[Counter[torch.device]] = Counter()
    limit: int | None = None


def set_decoded_limit(limit: int | None) -> None:
    """How many bytes of decoded matrices all caches of this process may keep together, on each device.

    Matrices that are kept already stay. One for which there is no room is decoded at every forward, which takes longer
    and gives the same numbers.

    Args:
        limit: bytes; 0 keeps none; None is a quarter of the device's memory.

    Raises:
        ValueError: it is negative.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"limit={limit}: a number of bytes is at least 0")
    _Decoded.limit = limit


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured; what is made then is computed by its replays only, and not to be kept."""
    return device.type == "cuda" and bool(torch.get_device_module(device).is_current_stream_capturing())


def decoded_room(device: torch.device) -> int:
    """Bytes of decoded matrices that may still be kept on a device; none while a CUDA graph is being captured."""
    if is_capturing(device):
        return 0
    limit = int(SHARE_OF_MEMORY * _memory(device)) if _Decoded.limit is None else _Decoded.limit
    return limit - _Decoded.kept[device]


def counted(matrix: Tensor) -> Tensor:
    """The matrix, counted as a decoded one for as long as it lives."""
    _Decoded.kept[matrix.device] += matrix.nbytes
    weakref.finalize(matrix, _uncount, matrix.device, matrix.nbytes)
    return matrix


def counted_transpose(matrix: Tensor) -> Tensor:
    """Its columns as rows, one after another: a view if they lie so already, else a copy, counted as decoded."""
    made = matrix.detach().t().contiguous()
    return made if made.data_ptr() == matrix.data_ptr() else counted(made)


def _uncount(device: torch.device, size: int) -> None:
    _Decoded.kept[device] -= size


@cache
def _memory(device: torch.device) -> int:
    """Bytes of memory of a device; 0 where nobody says."""
    if device.type == "cuda":
        return int(torch.get_device_module(device).get_device_properties(device).total_memory)
    if device.type != "cpu" or not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
