"""The weights that survived unstructured pruning, and a bit for every place."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import NonNegativeInt, model_validator
from torch import Tensor, nn
from torch.nn.functional import linear

from ffsplit.ffn.projections.base import Projection, StorageSpec
from ffsplit.kernels.masked import fill
from ffsplit.ops.packing import pack, packed_columns


class MaskedSpec(StorageSpec):
    """``kept`` weights, anywhere in the matrix, and a mask of one bit a weight."""

    kind: Literal["masked"] = "masked"
    kept: NonNegativeInt

    @model_validator(mode="after")
    def _fits(self) -> MaskedSpec:
        if self.kept > self.shape[0] * self.shape[1]:
            raise ValueError(f"kept={self.kept} is more than a matrix of shape {self.shape} has")
        return self

    @property
    def parameters(self) -> int:
        return self.kept

    @property
    def mask_bytes(self) -> int:
        """Of the packed mask."""
        return packed_columns(self.shape[0] * self.shape[1], 1)

    def stored_bits(self, float_bits: int) -> int:
        return self.kept * float_bits + 8 * self.mask_bytes

    @property
    def macs(self) -> int:
        """Those of the dense matrix: zeros in no order are multiplied by like any other number."""
        return self.shape[0] * self.shape[1]

    def describe(self) -> str:
        return f"{self.kept / max(self.shape[0] * self.shape[1], 1):.0%} of weights kept"


class Masked(Projection):
    """Surviving values row by row, and the packed mask. Smaller than the dense matrix, not faster."""

    mask: Tensor

    def __init__(self, spec: MaskedSpec, values: Float[Tensor, " kept"], mask: Tensor) -> None:
        super().__init__()
        self.spec: MaskedSpec = spec
        self.values = nn.Parameter(values.contiguous())
        self.register_buffer("mask", mask)

    @classmethod
    def from_dense(cls, weight: Float[Tensor, "out in"], kept: Bool[Tensor, "out in"]) -> Masked:
        """The weights that ``kept`` marks; the others become zero."""
        values = weight[kept]
        spec = MaskedSpec(shape=(weight.shape[0], weight.shape[1]), kept=len(values))
        # Packed across rows: exactly one bit a weight, whatever the width.
        return cls(spec, values, pack(kept.to(torch.uint8).flatten(), 1))

    @classmethod
    def empty(cls, spec: MaskedSpec, dtype: torch.dtype, device: torch.device) -> Masked:
        mask = torch.empty(spec.mask_bytes, dtype=torch.uint8, device=device)
        return cls(spec, torch.empty(spec.kept, dtype=dtype, device=device), mask)

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return fill(self.values, self.mask, *self.spec.shape, dtype or self.values.dtype)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return linear(x, self.dense(x.dtype))
