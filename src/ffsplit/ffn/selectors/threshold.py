"""Neurons whose activation is small for a token stay out of it."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ffsplit.ffn.selectors.base import Selector, SelectorSpecBase


class ThresholdSpec(SelectorSpecBase):
    """Thresholds on ``|act(gate)|`` (on ``|act(up)|`` without a gate): one for all neurons, or one each.

    Attributes:
        neurons: of the branch.
        shared: one threshold serves all neurons.
        sparsity: share of the activations, over neurons and tokens, that are at most as large as their threshold on
            the calibration text.
    """

    kind: Literal["threshold"] = "threshold"
    neurons: int = Field(ge=1)
    shared: bool = False
    sparsity: float = Field(ge=0, le=1)

    @property
    def parameters(self) -> int:
        return 1 if self.shared else self.neurons

    def check(self, neurons: int, d_model: int) -> None:
        if neurons != self.neurons:
            raise ValueError(f"the selector has {self.neurons} thresholds, the branch {neurons} neurons")

    def macs(self, up: int, gate: int, down: int) -> float:
        """The projection whose activation is looked at is computed whole: ``gate``, or ``up`` without one."""
        looked_at, skipped = (gate, up + down) if gate else (up, down)
        return looked_at + (1 - self.sparsity) * skipped

    def describe(self) -> str:
        return f"{self.sparsity:.0%} of activations skipped"


class Threshold(Selector):
    """Activations at most as large as their neuron's threshold become zero."""

    threshold: Tensor

    def __init__(self, spec: ThresholdSpec, threshold: Float[Tensor, " thresholds"]) -> None:
        super().__init__()
        self.spec: ThresholdSpec = spec
        self.register_buffer("threshold", threshold.contiguous())

    @classmethod
    def empty(cls, spec: ThresholdSpec, dtype: torch.dtype, device: torch.device) -> Threshold:
        return cls(spec, torch.empty(spec.parameters, dtype=dtype, device=device))

    def activations(
        self, a: Float[Tensor, "*tokens neurons"], x: Float[Tensor, "*tokens d_model"], act: nn.Module
    ) -> Float[Tensor, "*tokens neurons"]:
        return torch.where(a.abs() > self.threshold, a, torch.zeros_like(a))
