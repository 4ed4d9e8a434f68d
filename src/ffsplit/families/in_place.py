"""Changing a model's weights in place: not those that others share, and with a way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ffsplit.families.affine import RefusedError

Changed = list[tuple[Tensor, Tensor]]
"""Tensors that share memory with the model's, each with a copy of what it held before, in the order of the changes."""


def check_unshared(model: nn.Module, paths: Sequence[str]) -> None:
    """Refuse modules whose own parameters another module holds too.

    Raises:
        RefusedError: one does, with its name.
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for path in paths:
        for name, parameter in model.get_submodule(path).named_parameters(recurse=False):
            if owners[id(parameter)] > 1:
                raise RefusedError(f"{path}.{name} is shared with another module")


def overwrite(tensor: Tensor, value: Tensor | float, changed: Changed) -> None:
    """Write a value, rounded to the tensor's dtype, into its memory, and note what it held."""
    changed.append((tensor, tensor.clone()))
    tensor.copy_(value) if isinstance(value, Tensor) else tensor.fill_(value)


@contextmanager
def undone_on_error() -> Iterator[Changed]:
    """A list for `overwrite`; everything in it is put back, bit for bit, when something goes wrong."""
    changed: Changed = []
    try:
        yield changed
    except BaseException:
        for tensor, old in reversed(changed):  # the first change of a tensor has what it held before all of them
            tensor.copy_(old)
        raise
