"""Which neurons (or inputs) of a branch work for a token: the run-time half of activation sparsity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import linear

from ffsplit.ffn.projections.base import Spec

Which = Literal["up", "gate"]


class SelectorSpecBase(Spec, ABC):
    """The structure of one selector. Subclasses add a literal ``kind``, by which files tell them apart."""

    kind: str

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Stored numbers."""

    @abstractmethod
    def check(self, neurons: int, d_model: int) -> None:
        """Raise ValueError when this does not fit a branch of these sizes."""

    @abstractmethod
    def macs(self, up: int, gate: int, down: int) -> float:
        """Multiply-accumulates that an average token really needs, given those of the whole projections.

        The share is the one that was asked for, to which the numbers are calibrated. The plain forward computes
        everything and masks; only kernels for few tokens leave work out, and only for some selectors.
        """

    @abstractmethod
    def describe(self) -> str:
        """In a few words."""


class Selector(nn.Module, ABC):
    """Leaves out parts of a branch, token by token. Every hook is the identity unless a subclass says otherwise.

    What a selector stores are buffers: a choice between working and not working has no gradient to train it by.
    """

    spec: Any
    """The structure; which :class:`SelectorSpecBase` it is, the subclass says."""

    @classmethod
    @abstractmethod
    def empty(cls, spec: Any, dtype: torch.dtype, device: torch.device) -> Selector:
        """An uninitialised selector of the given structure, ready to be loaded into."""

    def inputs(self, x: Float[Tensor, "*tokens d_model"], which: Which) -> Float[Tensor, "*tokens d_model"]:
        """What the ``up`` or the ``gate`` projection is given."""
        return x

    def activations(
        self, a: Float[Tensor, "*tokens neurons"], x: Float[Tensor, "*tokens d_model"], act: nn.Module
    ) -> Float[Tensor, "*tokens neurons"]:
        """What becomes of ``a``, which is ``act(gate)`` (``act(up)`` without a gate), for the inputs ``x``."""
        return a

    def hidden(self, h: Float[Tensor, "*tokens neurons"]) -> Float[Tensor, "*tokens neurons"]:
        """What ``down`` is given."""
        return h


def largest(scores: Float[Tensor, "*tokens n"], count: int) -> Bool[Tensor, "*tokens n"]:
    """Which ``count`` entries of every row are the largest; exactly so many, also among equals."""
    chosen = scores.topk(count, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)


def full_precision_linear(
    x: Float[Tensor, "*tokens d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, "*tokens d_out"]:
    """``x weight^T + bias`` in float32, under autocast too: rounding must not decide who works."""
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.float(), weight.float(), None if bias is None else bias.float())
