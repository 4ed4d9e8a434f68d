"""For every token a fixed number of neurons: the largest among the candidates of a low-rank estimate."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ffsplit.ffn.selectors.base import Selector, SelectorSpecBase, full_precision_linear, largest


class TopKSpec(SelectorSpecBase):
    """How many neurons work, and what they are found by.

    Attributes:
        neurons: of the branch.
        d_model: of the branch.
        gated: the branch has a gate.
        biased: `up` or `gate` has a bias, which the estimate has too.
        rank: of the joint estimate of `up` and `gate`.
        candidates: neurons that the estimate proposes for a token, whose activations are computed.
        active: neurons that work.
    """

    kind: Literal["top_k"] = "top_k"
    neurons: int = Field(ge=1)
    d_model: int = Field(ge=1)
    gated: bool
    biased: bool
    rank: int = Field(ge=1)
    candidates: int = Field(ge=1)
    active: int = Field(ge=1)

    @property
    def rows(self) -> int:
        """Of the estimate: those of `up`, then those of `gate`."""
        return self.neurons * (2 if self.gated else 1)

    @property
    def parameters(self) -> int:
        return self.rank * (self.rows + self.d_model) + self.neurons + self.rows * self.biased

    def check(self, neurons: int, d_model: int) -> None:
        if (neurons, d_model) != (self.neurons, self.d_model):
            raise ValueError(
                f"the estimate is for {self.neurons} neurons of {self.d_model} inputs, the branch has {neurons} of "
                f"{d_model}"
            )
        if not self.active <= self.candidates <= neurons:
            raise ValueError(f"{self.active} of {self.candidates} candidates of {neurons} neurons cannot be")

    def macs(self, up: int, gate: int, down: int) -> float:
        """The estimate (weighing by lengths included), `up` and `gate` of the candidates, `down` of the chosen."""
        computed, used = self.candidates / self.neurons, self.active / self.neurons
        return self.parameters + (up + gate) * computed + down * used

    def describe(self) -> str:
        return f"{self.active:,} of {self.candidates:,} candidates a token, estimate of rank {self.rank}"


class TopK(Selector):
    """The neurons with the largest output ``|h_j| ||down_j||`` among those of the largest estimated output."""

    a: Tensor
    b: Tensor
    lengths: Tensor
    bias: Tensor | None

    def __init__(
        self,
        spec: TopKSpec,
        a: Float[Tensor, "rows rank"],
        b: Float[Tensor, "rank d_model"],
        lengths: Float[Tensor, " neurons"],
        bias: Float[Tensor, " rows"] | None = None,
    ) -> None:
        """Factors of the estimate ``a b x + bias`` of `up` and `gate`, and the lengths of the columns of `down`."""
        super().__init__()
        self.spec: TopKSpec = spec
        self.register_buffer("a", a.contiguous())
        self.register_buffer("b", b.contiguous())
        self.register_buffer("lengths", lengths.contiguous())
        self.register_buffer("bias", None if bias is None else bias.contiguous())

    @classmethod
    def empty(cls, spec: TopKSpec, dtype: torch.dtype, device: torch.device) -> TopK:
        def numbers(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        bias = numbers(spec.rows) if spec.biased else None
        return cls(spec, numbers(spec.rows, spec.rank), numbers(spec.rank, spec.d_model), numbers(spec.neurons), bias)

    def estimate(self, x: Float[Tensor, "*tokens d_model"], act: nn.Module) -> Float[Tensor, "*tokens neurons"]:
        """The estimated sizes of the neurons' outputs."""
        rows = full_precision_linear(full_precision_linear(x, self.b), self.a, self.bias)
        up, gate = rows[..., : self.spec.neurons], rows[..., self.spec.neurons :]
        hidden: Tensor = act(gate) * up if self.spec.gated else act(up)
        return hidden.abs() * self.lengths.float()

    def activations(
        self, a: Float[Tensor, "*tokens neurons"], x: Float[Tensor, "*tokens d_model"], act: nn.Module
    ) -> Float[Tensor, "*tokens neurons"]:
        return torch.where(largest(self.estimate(x, act), self.spec.candidates), a, torch.zeros_like(a))

    def hidden(self, h: Float[Tensor, "*tokens neurons"]) -> Float[Tensor, "*tokens neurons"]:
        kept = largest(h.float().abs() * self.lengths.float(), self.spec.active)
        return torch.where(kept, h, torch.zeros_like(h))
