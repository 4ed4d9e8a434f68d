"""Neurons that a cheap predictor expects to do little for a token stay out of it."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ffsplit.ffn.selectors.base import Selector, SelectorSpecBase, full_precision_linear


class PredictorSpec(SelectorSpecBase):
    """A low-rank affine map from the inputs to one number a neuron.

    Attributes:
        neurons: of the branch.
        d_model: of the branch.
        rank: of the map.
        sparsity: share of neurons that the predictor leaves out of a token, on average over the calibration text.
    """

    kind: Literal["predictor"] = "predictor"
    neurons: int = Field(ge=1)
    d_model: int = Field(ge=1)
    rank: int = Field(ge=1)
    sparsity: float = Field(ge=0, le=1)

    @property
    def parameters(self) -> int:
        return self.rank * (self.neurons + self.d_model) + self.neurons

    def check(self, neurons: int, d_model: int) -> None:
        if (neurons, d_model) != (self.neurons, self.d_model):
            raise ValueError(
                f"the predictor is for {self.neurons} neurons of {self.d_model} inputs, the branch has {neurons} of "
                f"{d_model}"
            )

    def macs(self, up: int, gate: int, down: int) -> float:
        """The predictor, and the share of neurons that works."""
        return self.parameters + (1 - self.sparsity) * (up + gate + down)

    def describe(self) -> str:
        return f"{self.sparsity:.0%} of neurons skipped by a predictor of rank {self.rank}"


class Predictor(Selector):
    """Neurons with ``a b x + bias`` above zero work, the others give zero."""

    a: Tensor
    b: Tensor
    bias: Tensor

    def __init__(
        self,
        spec: PredictorSpec,
        a: Float[Tensor, "neurons rank"],
        b: Float[Tensor, "rank d_model"],
        bias: Float[Tensor, " neurons"],
    ) -> None:
        super().__init__()
        self.spec: PredictorSpec = spec
        self.register_buffer("a", a.contiguous())
        self.register_buffer("b", b.contiguous())
        self.register_buffer("bias", bias.contiguous())

    @classmethod
    def empty(cls, spec: PredictorSpec, dtype: torch.dtype, device: torch.device) -> Predictor:
        def numbers(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(spec, numbers(spec.neurons, spec.rank), numbers(spec.rank, spec.d_model), numbers(spec.neurons))

    def scores(self, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens neurons"]:
        """What the predictor expects of every neuron, zero being where they start to work."""
        return full_precision_linear(full_precision_linear(x, self.b), self.a, self.bias)

    def activations(
        self, a: Float[Tensor, "*tokens neurons"], x: Float[Tensor, "*tokens d_model"], act: nn.Module
    ) -> Float[Tensor, "*tokens neurons"]:
        return torch.where(self.scores(x) > 0, a, torch.zeros_like(a))
