"""Training the codes of packed low-bit matrices, straight through their rounding."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from ffsplit.ffn.projections import Packed, Projection
from ffsplit.kernels.packed import decoded_scale
from ffsplit.ops.lsq import codes_of, rounded_weight
from ffsplit.ops.packing import pack, unpack
from ffsplit.ops.rounding import Grid, decode, nearest_scale


class TrainedCodes(Projection):
    """A packed matrix with weights under its codes, and a factor on the scale of every group.

    The forward rounds both to what can be stored and decodes that as the stored format is decoded, so that the finished
    matrix is the trained one to the bit. Zeros and factors of columns stay, and so do the row units of 8-bit scales.

    Attributes:
        weight: ``[out, in]``, float32, at first what the codes stand for, without the factors of columns.
        factor: ``[out, groups]``, of the stored scales.
    """

    zero: Float[Tensor, "out groups"]
    stored_scale: Float[Tensor, "out groups"]

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        spec = packed.spec
        self.spec = spec
        self.packed = packed
        scale = decoded_scale(packed.scale, packed.row_scale).float()
        middle = torch.full_like(scale, 2 ** (spec.bits - 1))
        zero = middle if packed.zero is None else unpack(packed.zero, spec.bits, scale.numel()).view_as(scale).float()
        self.register_buffer("zero", zero, persistent=False)
        self.register_buffer("stored_scale", scale, persistent=False)
        self.factor = nn.Parameter(torch.ones_like(scale))
        codes = unpack(packed.codes, spec.bits, spec.shape[1])
        self.weight = nn.Parameter(decode(codes, Grid(scale, zero.to(torch.uint8), spec.group), torch.float32))

    @classmethod
    def empty(cls, spec: object, dtype: torch.dtype, device: torch.device) -> TrainedCodes:
        return cls(Packed.empty(spec, dtype, device))  # type: ignore[arg-type]

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        decoded = rounded_weight(self.weight, self._scale(), self.zero, bits=self.spec.bits, group=self.spec.group)
        if self.packed.input_scale is not None:
            decoded = decoded * self.packed.input_scale.view(torch.float16).float()
        return decoded.to(dtype or torch.float32)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return linear(x, self.dense(x.dtype))

    def _scale(self) -> Float[Tensor, "out groups"]:
        """The trained scales, rounded to what can be stored; the gradient is that of the unrounded ones."""
        wanted = self.stored_scale * self.factor
        if self.packed.row_scale is None:
            sign = torch.where(self.stored_scale < 0, -1.0, 1.0)
            stored = sign * nearest_scale(sign * wanted.detach()).float()
        else:
            stored = nearest_scale(wanted.detach(), self.packed.row_scale.view(torch.float16))
        return stored + (wanted - wanted.detach())

    @torch.no_grad()
    def finished(self) -> Packed:
        """The packed matrix with the trained codes and scales."""
        packed, scale = self.packed, self._scale()
        codes = codes_of(self.weight, scale, self.zero, bits=self.spec.bits, group=self.spec.group)
        packed.codes.copy_(pack(codes.to(torch.uint8), self.spec.bits))
        if packed.row_scale is None:
            packed.scale.copy_(scale.half().view(torch.int16))
        else:
            units = packed.row_scale.view(torch.float16)
            packed.scale.copy_(Grid(scale, self.zero.to(torch.uint8), self.spec.group, units).scale_codes)
        return packed
