"""Int8 weights, one scale a row; the inputs become int8 at run time, one scale a token."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Float16, Int8
from torch import Tensor

from ffsplit.ffn.projections.base import Projection, StorageSpec
from ffsplit.kernels.int8 import LARGEST, int8_linear, round_rows
from ffsplit.ops.rounding import storable_row_scale

CODE_BITS, SCALE_BITS = 8, 16


class Int8DynamicSpec(StorageSpec):
    """Symmetric int8 codes and a float16 scale a row; inputs are rounded to int8 per token."""

    kind: Literal["int8_dynamic"] = "int8_dynamic"

    @property
    def rounds_inputs(self) -> bool:
        return True

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    def stored_bits(self, float_bits: int) -> int:
        """Bits of codes and scales; independent of ``float_bits``."""
        return self.shape[0] * (self.shape[1] * CODE_BITS + SCALE_BITS)

    def describe(self) -> str:
        return "int8, inputs int8 per token"


class Int8Dynamic(Projection):
    """Int8 codes, and float16 scales as int16 bit patterns, which no cast of the model rounds."""

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Int8[Tensor, "out in"], scale: Tensor) -> None:
        super().__init__()
        self.spec = Int8DynamicSpec(shape=(codes.shape[0], codes.shape[1]))
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    @classmethod
    def from_dense(cls, weight: Float[Tensor, "out in"], spec: Int8DynamicSpec, dtype: torch.dtype) -> Int8Dynamic:
        """The nearest codes at the scales that are stored; ``dtype`` plays no part."""
        scale = storable_row_scale(weight, LARGEST)
        return cls(round_rows(weight, scale.float()[:, None])[0], scale.view(torch.int16))

    @classmethod
    def empty(cls, spec: Int8DynamicSpec, dtype: torch.dtype, device: torch.device) -> Int8Dynamic:
        scale = torch.empty(spec.shape[0], dtype=torch.int16, device=device)
        return cls(torch.empty(spec.shape, dtype=torch.int8, device=device), scale)

    @property
    def row_scale(self) -> Float16[Tensor, " out"]:
        return self.scale.view(torch.float16)

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        dtype = dtype or torch.float32
        wide = torch.promote_types(dtype, torch.float32)
        return (self.codes.to(wide) * self.row_scale.to(wide)[:, None]).to(dtype)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return int8_linear(x, self.codes, self.scale, self.derived)
