"""Low-bit codes in groups that share a scale and a zero."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from ffsplit.ffn.projections.base import Projection, StorageSpec
from ffsplit.kernels.packed import dequantize, packed_linear
from ffsplit.ops.packing import pack, packed_columns
from ffsplit.ops.rounding import Grid

SCALE_BITS = 16


class PackedSpec(StorageSpec):
    """Codes of ``bits`` bits in groups along the input dimension, each group with a float16 scale and a zero."""

    kind: Literal["packed"] = "packed"
    bits: int = Field(ge=1, le=8)
    group: int = Field(ge=1)
    symmetric: bool = False

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // self.group)

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    def stored_bits(self, float_bits: int) -> int:
        """Bits of codes (with the padding of their rows), scales and zeros; independent of ``float_bits``."""
        rows, columns = self.shape
        zeros = 0 if self.symmetric else 8 * packed_columns(rows * self.groups, self.bits)
        return rows * (8 * packed_columns(columns, self.bits) + SCALE_BITS * self.groups) + zeros

    def describe(self) -> str:
        return f"int{self.bits} in groups of {self.group}"


class Packed(Projection):
    """Low-bit codes, float16 scales and integer zeros, in groups along the input dimension.

    The scales are kept as int16 bit patterns: ``model.to(bfloat16)`` or ``from_pretrained(dtype=...)`` casts
    floating-point tensors, and a rounded scale would silently change every weight of its group.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, spec: PackedSpec, codes: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        super().__init__()
        self.spec: PackedSpec = spec
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    @classmethod
    def from_codes(
        cls, codes: UInt8[Tensor, "out in"], grid: Grid, *, bits: int, group: int, symmetric: bool = False
    ) -> Packed:
        """Pack integer codes and their grid; a symmetric grid drops its constant zeros."""
        spec = PackedSpec(
            shape=(codes.shape[0], codes.shape[1]), bits=bits, group=min(group, codes.shape[1]), symmetric=symmetric
        )
        # Packed across rows: padding every row's few zeros to whole bytes would cost more than the zeros.
        zero = None if symmetric else pack(grid.zero.to(torch.uint8).flatten(), bits)
        return cls(spec, pack(codes, bits), grid.scale.to(torch.float16).view(torch.int16), zero)

    @classmethod
    def empty(cls, spec: PackedSpec, dtype: torch.dtype, device: torch.device) -> Packed:
        rows, columns = spec.shape
        zeros = packed_columns(rows * spec.groups, spec.bits)
        return cls(
            spec,
            torch.empty(rows, packed_columns(columns, spec.bits), dtype=torch.uint8, device=device),
            torch.empty(rows, spec.groups, dtype=torch.int16, device=device),
            None if spec.symmetric else torch.empty(zeros, dtype=torch.uint8, device=device),
        )

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        spec = self.spec
        return dequantize(
            self.codes,
            self.scale,
            self.zero,
            bits=spec.bits,
            group=spec.group,
            columns=spec.shape[1],
            dtype=dtype or torch.float32,
        )

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return packed_linear(x, self.codes, self.scale, self.zero, bits=self.spec.bits, group=self.spec.group)
