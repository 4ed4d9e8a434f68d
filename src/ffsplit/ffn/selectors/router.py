"""Neurons in experts, of which a router picks some for every token."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ffsplit.ffn.selectors.base import Selector, SelectorSpecBase, full_precision_linear, largest
from ffsplit.ops.clustering import cluster_sizes


class RouterSpec(SelectorSpecBase):
    """An affine router over experts of equal size. The neurons of an expert follow each other.

    Attributes:
        neurons: of the branch, ``experts`` runs of them; where they do not divide evenly the first ones have one more.
        d_model: of the branch.
        experts: how many.
        active: experts that work for a token.
    """

    kind: Literal["router"] = "router"
    neurons: int = Field(ge=1)
    d_model: int = Field(ge=1)
    experts: int = Field(ge=1)
    active: int = Field(ge=1)

    @property
    def parameters(self) -> int:
        return self.experts * (self.d_model + 1)

    def check(self, neurons: int, d_model: int) -> None:
        if (neurons, d_model) != (self.neurons, self.d_model):
            raise ValueError(
                f"the router is for {self.neurons} neurons of {self.d_model} inputs, the branch has {neurons} of "
                f"{d_model}"
            )
        if not self.active <= self.experts <= neurons:
            raise ValueError(f"{self.active} active of {self.experts} experts of {neurons} neurons cannot be")

    def macs(self, up: int, gate: int, down: int) -> float:
        """The router, and the share of experts that work."""
        return self.parameters + (up + gate + down) * self.active / self.experts

    def describe(self) -> str:
        return f"{self.active} of {self.experts} experts a token"


class Router(Selector):
    """The experts with the highest scores ``weight x + bias`` work, the neurons of the others give zero."""

    weight: Tensor
    bias: Tensor

    def __init__(
        self, spec: RouterSpec, weight: Float[Tensor, "experts d_model"], bias: Float[Tensor, " experts"]
    ) -> None:
        super().__init__()
        self.spec: RouterSpec = spec
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("bias", bias.contiguous())

    @classmethod
    def empty(cls, spec: RouterSpec, dtype: torch.dtype, device: torch.device) -> Router:
        weight = torch.empty(spec.experts, spec.d_model, dtype=dtype, device=device)
        return cls(spec, weight, torch.empty(spec.experts, dtype=dtype, device=device))

    def activations(
        self, a: Float[Tensor, "*tokens neurons"], x: Float[Tensor, "*tokens d_model"], act: nn.Module
    ) -> Float[Tensor, "*tokens neurons"]:
        chosen = largest(full_precision_linear(x, self.weight, self.bias), self.spec.active)
        larger, sizes = self.spec.neurons % self.spec.experts, cluster_sizes(self.spec.neurons, self.spec.experts)
        runs = [
            chosen[..., :larger].repeat_interleave(sizes[0], dim=-1),
            chosen[..., larger:].repeat_interleave(sizes[-1], dim=-1),
        ]
        return torch.where(torch.cat(runs, dim=-1), a, torch.zeros_like(a))
