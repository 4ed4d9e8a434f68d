"""Float8 (e4m3) weights with one scale a row; the inputs too, at run time, if wanted."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ffsplit.ffn.projections.base import Projection, StorageSpec
from ffsplit.kernels.float8 import LARGEST, decode, float8_linear, round_rows
from ffsplit.ops.rounding import storable_row_scale

CODE_BITS, SCALE_BITS = 8, 16


class Float8Spec(StorageSpec):
    """Float8 weights and a float16 scale a row.

    Attributes:
        activations: whether inputs are rounded to float8 per token.
    """

    kind: Literal["float8"] = "float8"
    activations: bool = False

    @property
    def rounds_inputs(self) -> bool:
        return self.activations

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    def stored_bits(self, float_bits: int) -> int:
        """Bits of weights and scales; independent of ``float_bits``."""
        return self.shape[0] * (self.shape[1] * CODE_BITS + SCALE_BITS)

    def describe(self) -> str:
        return "float8, inputs float8 per token" if self.activations else "float8"


class Float8(Projection):
    """Bit patterns of float8 weights (uint8) and of float16 scales (int16): a cast of the model would widen floats."""

    codes: Tensor
    scale: Tensor

    def __init__(self, spec: Float8Spec, codes: UInt8[Tensor, "out in"], scale: Tensor) -> None:
        super().__init__()
        self.spec: Float8Spec = spec
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    @classmethod
    def from_dense(cls, weight: Float[Tensor, "out in"], spec: Float8Spec, dtype: torch.dtype) -> Float8:
        """The nearest float8 at the scales that are stored; ``dtype`` plays no part."""
        scale = storable_row_scale(weight, LARGEST)
        return cls(spec, round_rows(weight, scale.float()[:, None])[0], scale.view(torch.int16))

    @classmethod
    def empty(cls, spec: Float8Spec, dtype: torch.dtype, device: torch.device) -> Float8:
        codes = torch.empty(spec.shape, dtype=torch.uint8, device=device)
        return cls(spec, codes, torch.empty(spec.shape[0], dtype=torch.int16, device=device))

    @property
    def row_scale(self) -> Float[Tensor, "out 1"]:
        return self.scale.view(torch.float16).float()[:, None]

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return decode(self.codes, self.row_scale, dtype or torch.float32)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return float8_linear(x, self.codes, self.row_scale, activations=self.spec.activations)
