"""What runs the branches of a sum by kernels over all of them knows them, and notices when they were replaced."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from ffsplit.ffn.places import Held
from ffsplit.kernels import nvrtc
from ffsplit.kernels.cache import DerivedCache

if TYPE_CHECKING:
    from ffsplit.ffn.sum import Branch


@runtime_checkable
class Known(Protocol):
    """What was found out about branches.

    Attributes:
        modules: where the modules are on which it depends, and which they were.
    """

    @property
    def modules(self) -> Held: ...


K = TypeVar("K", bound=Known)
L = TypeVar("L")


class WatchedBranches(ABC, Generic[K, L]):
    """What is known of the branches of a sum, what was made from them, and the launches that are ready.

    It is found when it is first needed, and again after a module or a tensor of theirs was replaced. Copies and pickles
    of a sum find it anew.
    """

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Forget everything; what is asked for next is found and made anew."""
        self.derived = DerivedCache()
        self._branches: tuple[Branch, ...] = ()
        self._known: K | None = None
        self._addresses: list[int] = []
        self._launches: dict[Hashable, L] = {}

    @abstractmethod
    def _look(self, branches: Sequence[Branch]) -> K:
        """Find out about branches."""

    def _found(self, branches: Sequence[Branch]) -> K:
        known = self._known
        if known is None or tuple(branches) != self._branches or not known.modules.is_unchanged():
            self.drop()
            self._branches, self._known = tuple(branches), (known := self._look(branches))
        return known

    def _launch(self, key: Hashable, tensors: Sequence[Tensor | None], make: Callable[[list[int]], L]) -> L:
        """What ``make`` gives for the tensors' addresses, once for every key as long as they stay where they are."""
        addresses = nvrtc.addresses(tensors)
        if addresses != self._addresses:
            # In this order: a thread that comes between the two makes its launch anew.
            self._launches = {}
            self._addresses = addresses
        if key not in self._launches:
            self._launches[key] = make(addresses)
        return self._launches[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> WatchedBranches[K, L]:
        return type(self)()

    def __reduce__(self) -> tuple[type[WatchedBranches[K, L]], tuple[()]]:
        return type(self), ()
