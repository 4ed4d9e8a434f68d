"""A plain matrix."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from ffsplit.ffn.projections.base import Projection, StorageSpec


class DenseSpec(StorageSpec):
    """A plain matrix ``[out, in]``."""

    kind: Literal["dense"] = "dense"

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    def stored_bits(self, float_bits: int) -> int:
        return self.parameters * float_bits

    def describe(self) -> str:
        return "dense"


class Dense(Projection):
    """A plain matrix."""

    def __init__(self, weight: Float[Tensor, "out in"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous())
        self.spec = DenseSpec(shape=(weight.shape[0], weight.shape[1]))

    @classmethod
    def empty(cls, spec: DenseSpec, dtype: torch.dtype, device: torch.device) -> Dense:
        return cls(torch.empty(spec.shape, dtype=dtype, device=device))

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return self.weight.to(dtype or self.weight.dtype)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return linear(x, self.weight)
