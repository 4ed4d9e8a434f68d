"""Low-bit codes in groups that share a scale and a zero."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Float16, UInt8
from pydantic import Field
from torch import Tensor

from ffsplit.ffn.projections.base import Projection, StorageSpec
from ffsplit.kernels.packed import PackedTensors, packed_linear
from ffsplit.ops.packing import pack, packed_columns
from ffsplit.ops.rounding import Grid

ScaleBits = Literal[8, 16]
"""Float16 scales, or 8-bit multiples of a unit per row."""
FLOAT16_BITS = 16


class PackedSpec(StorageSpec):
    """Codes of ``bits`` bits in groups along the input dimension, each group with a scale and a zero.

    Attributes:
        scale_bits: 16: float16 scales; 8: multiples of a unit per row, which is a float16.
        input_scale: whether each column has a float16 factor of its own.
    """

    kind: Literal["packed"] = "packed"
    bits: int = Field(ge=1, le=8)
    group: int = Field(ge=1)
    symmetric: bool = False
    scale_bits: ScaleBits = 16
    input_scale: bool = False

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // self.group)

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    def stored_bits(self, float_bits: int) -> int:
        """Bits of codes (with the padding of their rows), all scales and zeros; independent of ``float_bits``."""
        rows, columns = self.shape
        zeros = 0 if self.symmetric else 8 * packed_columns(rows * self.groups, self.bits)
        scales = self.scale_bits * self.groups + (FLOAT16_BITS if self.scale_bits == 8 else 0)
        inputs = FLOAT16_BITS * columns if self.input_scale else 0
        return rows * (8 * packed_columns(columns, self.bits) + scales) + zeros + inputs

    def describe(self) -> str:
        told = ["8-bit scales"] if self.scale_bits == 8 else []
        told += ["scaled inputs"] if self.input_scale else []
        extras = f" with {' and '.join(told)}" if told else ""
        return f"int{self.bits} in groups of {self.group}{extras}"


class Packed(Projection):
    """Low-bit codes, scales and integer zeros, in groups along the input dimension.

    Float16 scales (of the groups, or the one per row of 8-bit scales, or of the columns) are kept as int16 bit
    patterns: ``model.to(bfloat16)`` or ``from_pretrained(dtype=...)`` casts floating-point tensors, and a rounded scale
    would silently change every weight of its group.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    row_scale: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        spec: PackedSpec,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        row_scale: Tensor | None = None,
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.spec: PackedSpec = spec
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("row_scale", row_scale)
        self.register_buffer("input_scale", input_scale)

    @classmethod
    def from_codes(
        cls,
        codes: UInt8[Tensor, "out in"],
        grid: Grid,
        *,
        bits: int,
        group: int,
        symmetric: bool = False,
        input_scale: Float16[Tensor, " in"] | None = None,
    ) -> Packed:
        """Pack integer codes and their grid; a symmetric grid drops its constant zeros."""
        spec = PackedSpec(
            shape=(codes.shape[0], codes.shape[1]),
            bits=bits,
            group=min(group, codes.shape[1]),
            symmetric=symmetric,
            scale_bits=16 if grid.row_scale is None else 8,
            input_scale=input_scale is not None,
        )
        # Packed across rows: padding every row's few zeros to whole bytes would cost more than the zeros.
        zero = None if symmetric else pack(grid.zero.to(torch.uint8).flatten(), bits)
        inputs = None if input_scale is None else input_scale.view(torch.int16).clone()
        if grid.row_scale is None:
            scale, row_scale = grid.scale.to(torch.float16).view(torch.int16), None
        else:
            scale, row_scale = grid.scale_codes, grid.row_scale.view(torch.int16)
        return cls(spec, pack(codes, bits), scale, zero, row_scale, inputs)

    @classmethod
    def empty(cls, spec: PackedSpec, dtype: torch.dtype, device: torch.device) -> Packed:
        rows, columns = spec.shape
        zeros = packed_columns(rows * spec.groups, spec.bits)
        eight = spec.scale_bits == 8
        return cls(
            spec,
            torch.empty(rows, packed_columns(columns, spec.bits), dtype=torch.uint8, device=device),
            torch.empty(rows, spec.groups, dtype=torch.uint8 if eight else torch.int16, device=device),
            None if spec.symmetric else torch.empty(zeros, dtype=torch.uint8, device=device),
            torch.empty(rows, dtype=torch.int16, device=device) if eight else None,
            torch.empty(columns, dtype=torch.int16, device=device) if spec.input_scale else None,
        )

    def stored(self) -> PackedTensors:
        """The tensors as its kernels take them."""
        spec = self.spec
        return PackedTensors(
            self.codes,
            self.scale,
            self.zero,
            self.row_scale,
            self.input_scale,
            bits=spec.bits,
            group=spec.group,
            columns=spec.shape[1],
        )

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return self.stored().dense(dtype or torch.float32)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return packed_linear(x, self.stored(), self.derived)
