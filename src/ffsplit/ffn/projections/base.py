"""What every storage of a projection has: a structure that can be counted, and a forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, NonNegativeInt
from torch import Tensor, nn

from ffsplit.kernels.cache import DerivedCache

Shape = tuple[NonNegativeInt, NonNegativeInt]
"""``[out, in]``."""


class Spec(BaseModel):
    """Structure without numbers: frozen, stored in ``config.json``, an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StorageSpec(Spec, ABC):
    """The structure of one projection. Subclasses add a literal ``kind``, by which files tell them apart."""

    kind: str
    shape: Shape

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Stored numbers; a packed code counts as one."""

    @abstractmethod
    def stored_bits(self, float_bits: int) -> int:
        """Stored bits, everything counted, when floating-point numbers take ``float_bits`` each."""

    @abstractmethod
    def describe(self) -> str:
        """How the matrix is stored, in a few words."""

    @property
    def rounds_inputs(self) -> bool:
        """Whether the inputs are rounded at run time, which no dense matrix does."""
        return False

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one token; one a stored number unless the storage says otherwise."""
        return self.parameters


class Projection(nn.Module, ABC):
    """A matrix ``W [out, in]`` in some storage. ``forward`` gives ``x W^T``; biases belong to the branch.

    Attributes:
        derived: what its kernels have made of the stored tensors.
    """

    spec: Any
    """The structure; which :class:`StorageSpec` it is, the subclass says."""

    def __init__(self) -> None:
        super().__init__()
        self.derived = DerivedCache()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Projection:
        # A cast or a move may leave the tensors' versions as they were.
        self.derived.drop()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @classmethod
    @abstractmethod
    def empty(cls, spec: Any, dtype: torch.dtype, device: torch.device) -> Projection:
        """An uninitialised projection of the given structure, ready to be loaded into."""

    @abstractmethod
    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        """The matrix itself, in ``dtype`` (default: the storage's own, float32 for packed codes)."""

    def extra_repr(self) -> str:
        details = self.spec.model_dump(exclude={"kind", "shape"})
        return ", ".join([f"{self.spec.shape[0]}x{self.spec.shape[1]}", *(f"{k}={v}" for k, v in details.items())])
