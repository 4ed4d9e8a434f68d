"""Inputs of a projection that are small for a token stay out, with the columns of the weight that they meet."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ffsplit.ffn.selectors.base import Selector, SelectorSpecBase, Which

ORDER = ("up", "down", "gate")


class InputThresholdSpec(SelectorSpecBase):
    """One threshold a projection on the absolute values of its inputs.

    Attributes:
        gated: the branch has a gate.
        sparsity: share of the inputs that are at most as large as their threshold on the calibration text, averaged
            over the projections by their weights. How it is shared between them depends on the text.
    """

    kind: Literal["input_threshold"] = "input_threshold"
    gated: bool
    sparsity: float = Field(ge=0, le=1)

    @property
    def parameters(self) -> int:
        return 3 if self.gated else 2

    def check(self, neurons: int, d_model: int) -> None:
        """Thresholds fit branches of any size."""

    def macs(self, up: int, gate: int, down: int) -> float:
        """Dense projections of equal size: however the sparsity is shared, the sum is the same."""
        return (1 - self.sparsity) * (up + gate + down)

    def describe(self) -> str:
        return f"{self.sparsity:.0%} of inputs skipped"


class InputThreshold(Selector):
    """Inputs at most as large as their projection's threshold become zero."""

    threshold: Tensor

    def __init__(self, spec: InputThresholdSpec, threshold: Float[Tensor, " projections"]) -> None:
        """Thresholds of `up`, `down` and, if there is one, `gate`."""
        super().__init__()
        self.spec: InputThresholdSpec = spec
        self.register_buffer("threshold", threshold.contiguous())

    @classmethod
    def empty(cls, spec: InputThresholdSpec, dtype: torch.dtype, device: torch.device) -> InputThreshold:
        return cls(spec, torch.empty(spec.parameters, dtype=dtype, device=device))

    def _masked(self, values: Tensor, projection: str) -> Tensor:
        kept = values.abs() > self.threshold[ORDER.index(projection)]
        return torch.where(kept, values, torch.zeros_like(values))

    def inputs(self, x: Float[Tensor, "*tokens d_model"], which: Which) -> Float[Tensor, "*tokens d_model"]:
        return self._masked(x, which)

    def hidden(self, h: Float[Tensor, "*tokens neurons"]) -> Float[Tensor, "*tokens neurons"]:
        return self._masked(h, "down")
