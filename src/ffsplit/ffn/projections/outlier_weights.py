"""Low-bit codes for the whole matrix, and a 16-bit number on top of a few single weights that cannot be rounded."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.functional import linear

from ffsplit.ffn.projections.base import Projection, StorageSpec
from ffsplit.ffn.projections.packed import Packed, PackedSpec

INDEX_BITS = 16
COUNT_BITS = 32
WIDEST = 1 << INDEX_BITS


class OutlierWeightsSpec(StorageSpec):
    """A packed matrix and a sparse one, which is added to it.

    Attributes:
        packed: the whole matrix in codes.
        outliers: entries of the sparse matrix.
    """

    kind: Literal["outlier_weights"] = "outlier_weights"
    packed: PackedSpec
    outliers: PositiveInt

    @model_validator(mode="after")
    def _fits(self) -> OutlierWeightsSpec:
        if self.packed.shape != self.shape or self.outliers > self.shape[0] * self.shape[1]:
            raise ValueError(f"{self.outliers} weights and codes of shape {self.packed.shape} do not make {self.shape}")
        if self.shape[1] > WIDEST:
            raise ValueError(f"{self.shape[1]} columns: places of single weights are stored for {WIDEST} at most")
        return self

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    def stored_bits(self, float_bits: int) -> int:
        """The codes, and for every outlier its value and column; and how many a row has."""
        beside = self.outliers * (float_bits + INDEX_BITS) + self.shape[0] * COUNT_BITS
        return self.packed.stored_bits(float_bits) + beside

    @property
    def macs(self) -> int:
        return self.packed.macs + self.outliers

    def describe(self) -> str:
        return f"{self.packed.describe()}, {self.outliers} weights in full"


class OutlierWeights(Projection):
    """``packed``, plus ``values`` at the ``columns`` of each row, of which row i has ``counts[i]``, row after row."""

    columns: Tensor
    counts: Tensor

    def __init__(
        self,
        packed: Packed,
        columns: Int[Tensor, " outliers"],
        counts: Int[Tensor, " out"],
        values: Float[Tensor, " outliers"],
    ) -> None:
        super().__init__()
        spec = packed.spec
        self.spec = OutlierWeightsSpec(shape=spec.shape, packed=spec, outliers=values.shape[0])
        self.packed = packed
        self.values = nn.Parameter(values.contiguous())
        # Unsigned, in the bit patterns of a type that every device has.
        self.register_buffer("columns", columns.to(torch.int16))
        self.register_buffer("counts", counts.to(torch.int32))

    @classmethod
    def at(cls, packed: Packed, places: Int[Tensor, " outliers"], values: Float[Tensor, " outliers"]) -> OutlierWeights:
        """From ascending places in the matrix, row by row."""
        rows, columns = packed.spec.shape
        counts = torch.bincount(places // columns, minlength=rows)
        return cls(packed, places % columns, counts, values)

    @classmethod
    def empty(cls, spec: OutlierWeightsSpec, dtype: torch.dtype, device: torch.device) -> OutlierWeights:
        return cls(
            Packed.empty(spec.packed, dtype, device),
            torch.empty(spec.outliers, dtype=torch.int16, device=device),
            torch.empty(spec.shape[0], dtype=torch.int32, device=device),
            torch.empty(spec.outliers, dtype=dtype, device=device),
        )

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        dtype = dtype or torch.float32
        numbers = torch.arange(self.spec.shape[0], device=self.counts.device)
        rows = torch.repeat_interleave(numbers, self.counts, output_size=self.spec.outliers)
        columns = self.columns.long() % WIDEST
        return self.packed.dense(dtype).index_put((rows, columns), self.values.to(dtype), accumulate=True)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return linear(x, self.dense(x.dtype))
