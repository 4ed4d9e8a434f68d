"""Low-bit codes for most input columns, and 16 bits for a few that cannot be rounded."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn.functional import linear

from ffsplit.ffn.projections.base import Projection, StorageSpec
from ffsplit.ffn.projections.packed import Packed, PackedSpec
from ffsplit.ops.outliers import other_columns

INDEX_BITS = 32


class OutlierColumnsSpec(StorageSpec):
    """Columns in full and the packed matrix of the others. For `down` a column is a neuron: its heavy neurons.

    Attributes:
        packed: the matrix without the outlier columns.
    """

    kind: Literal["outlier_columns"] = "outlier_columns"
    packed: PackedSpec

    @model_validator(mode="after")
    def _some_columns(self) -> OutlierColumnsSpec:
        if self.packed.shape[0] != self.shape[0] or not 0 < self.packed.shape[1] < self.shape[1]:
            raise ValueError(f"packed columns of shape {self.packed.shape} leave no outliers of shape {self.shape}")
        return self

    @property
    def outliers(self) -> int:
        """How many columns are stored in full."""
        return self.shape[1] - self.packed.shape[1]

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    def stored_bits(self, float_bits: int) -> int:
        """The packed matrix, the other columns as floats, and where they stand."""
        return self.packed.stored_bits(float_bits) + self.outliers * (self.shape[0] * float_bits + INDEX_BITS)

    def describe(self) -> str:
        return f"{self.packed.describe()}, {self.outliers} columns in full"


class OutlierColumns(Projection):
    """``values`` at the columns ``index``, and the packed columns in their order at the others."""

    index: Tensor

    def __init__(self, packed: Packed, index: Int[Tensor, " outliers"], values: Float[Tensor, "out outliers"]) -> None:
        super().__init__()
        rows, columns = packed.spec.shape
        self.spec = OutlierColumnsSpec(shape=(rows, columns + index.shape[0]), packed=packed.spec)
        self.packed = packed
        self.values = nn.Parameter(values.contiguous())
        self.register_buffer("index", index.to(torch.int32))

    @classmethod
    def empty(cls, spec: OutlierColumnsSpec, dtype: torch.dtype, device: torch.device) -> OutlierColumns:
        return cls(
            Packed.empty(spec.packed, dtype, device),
            torch.empty(spec.outliers, dtype=torch.int32, device=device),
            torch.empty(spec.shape[0], spec.outliers, dtype=dtype, device=device),
        )

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        dtype = dtype or torch.float32
        order = torch.cat([other_columns(self.index, self.spec.shape[1]), self.index.long()])
        return torch.cat([self.packed.dense(dtype), self.values.to(dtype)], dim=1)[:, order.argsort()]

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return linear(x, self.dense(x.dtype))
