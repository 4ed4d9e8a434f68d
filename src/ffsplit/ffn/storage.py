"""How a projection ``x W^T`` of a branch is stored: dense, low rank, or packed low-bit codes."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import linear

from ffsplit.ffn.spec import DenseSpec, LowRankSpec, PackedSpec
from ffsplit.kernels.packed import dequantize, packed_linear
from ffsplit.ops.packing import pack, packed_columns
from ffsplit.ops.rounding import Grid


class Projection(nn.Module, ABC):
    """A matrix ``W [out, in]`` in some storage. ``forward`` gives ``x W^T``; biases belong to the branch."""

    spec: DenseSpec | LowRankSpec | PackedSpec

    @abstractmethod
    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        """The matrix itself, in ``dtype`` (default: the storage's own, float32 for packed codes)."""

    def extra_repr(self) -> str:
        details = self.spec.model_dump(exclude={"kind", "shape"})
        return ", ".join([f"{self.spec.shape[0]}x{self.spec.shape[1]}", *(f"{k}={v}" for k, v in details.items())])


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
        return linear(linear(x, self.b), self.a)


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


def empty_projection(
    spec: DenseSpec | LowRankSpec | PackedSpec, dtype: torch.dtype, device: torch.device
) -> Projection:
    """An uninitialised projection of the given structure, ready to be loaded into."""
    if isinstance(spec, DenseSpec):
        return Dense.empty(spec, dtype, device)
    if isinstance(spec, LowRankSpec):
        return LowRank.empty(spec, dtype, device)
    return Packed.empty(spec, dtype, device)
