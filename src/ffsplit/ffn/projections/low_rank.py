"""A product of two thin matrices."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear

from ffsplit.ffn.projections.base import Projection, StorageSpec
from ffsplit.kernels.cpu_columns import tall_linear


class LowRankSpec(StorageSpec):
    """``a b`` with ``a [out, rank]`` and ``b [rank, in]``."""

    kind: Literal["low_rank"] = "low_rank"
    rank: int = Field(ge=0)

    @property
    def parameters(self) -> int:
        return self.rank * (self.shape[0] + self.shape[1])

    def stored_bits(self, float_bits: int) -> int:
        return self.parameters * float_bits

    def describe(self) -> str:
        return f"rank {self.rank}"


class LowRank(Projection):
    """``W = a b``."""

    def __init__(self, a: Float[Tensor, "out rank"], b: Float[Tensor, "rank in"]) -> None:
        super().__init__()
        self.a = nn.Parameter(a.contiguous())
        self.b = nn.Parameter(b.contiguous())
        self.spec = LowRankSpec(shape=(a.shape[0], b.shape[1]), rank=a.shape[1])

    @classmethod
    def empty(cls, spec: LowRankSpec, dtype: torch.dtype, device: torch.device) -> LowRank:
        rows, columns = spec.shape
        return cls(
            torch.empty(rows, spec.rank, dtype=dtype, device=device),
            torch.empty(spec.rank, columns, dtype=dtype, device=device),
        )

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        dtype = dtype or self.a.dtype
        return self.a.to(dtype) @ self.b.to(dtype)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return tall_linear(linear(x, self.b), self.a, self.derived)
