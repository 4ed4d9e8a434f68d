"""One forward inside a dispatch mode, watched at every module's door."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ffsplit.families.projection import is_projection


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of nested containers, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class HookedRun(ABC):
    """Context manager around one forward. Removes its hooks in every case.

    Args:
        names: the modules to watch, and their paths.
        mode: a dispatch mode that the forward runs in.
    """

    def __init__(self, names: dict[nn.Module, str], mode: Any) -> None:
        self._names = names
        self._mode = mode
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for module in self._names:
            after = self._after_projection if is_projection(module) else self._after
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after))
        self._mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._mode.__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    @abstractmethod
    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module was called."""

    @abstractmethod
    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        """A module that is no projection, or any if there is no other hook for those, has returned."""

    def _after_projection(self, module: nn.Module, args: Any, output: Any) -> None:
        """A projection has returned."""
        self._after(module, args, output)
