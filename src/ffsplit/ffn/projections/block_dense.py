"""A block-diagonal matrix followed by a dense one: each block of inputs has a low rank of its own."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import linear

from ffsplit.ffn.projections.base import Projection, StorageSpec
from ffsplit.kernels.block_diagonal import block_diagonal
from ffsplit.ops.block_factors import block_size, whole_blocks


class BlockDenseSpec(StorageSpec):
    """``a blkdiag(b)`` with ``a [out, rank]`` and ``b [blocks, rank / blocks, ceil(in / blocks)]``.

    Attributes:
        blocks: of the inputs; where they do not divide ``in``, the last one is filled up with zeros, which count.
        rank: of all blocks together.
    """

    kind: Literal["block_dense"] = "block_dense"
    blocks: int = Field(ge=1)
    rank: int = Field(ge=0)

    @model_validator(mode="after")
    def _whole(self) -> BlockDenseSpec:
        if self.blocks > self.shape[1] or whole_blocks(self.shape[1], self.blocks) != self.blocks:
            raise ValueError(f"blocks={self.blocks} leaves an empty block of {self.shape[1]} inputs")
        if self.rank % self.blocks:
            raise ValueError(f"rank={self.rank} is not a multiple of blocks={self.blocks}")
        return self

    @property
    def width(self) -> int:
        """Inputs of a block."""
        return block_size(self.shape[1], self.blocks)

    @property
    def parameters(self) -> int:
        return self.rank * (self.shape[0] + self.width)

    def stored_bits(self, float_bits: int) -> int:
        return self.parameters * float_bits

    def describe(self) -> str:
        return f"block-dense, rank {self.rank} in {self.blocks} blocks"


class BlockDense(Projection):
    """``W = a blkdiag(b)``."""

    def __init__(self, columns: int, a: Float[Tensor, "out rank"], b: Float[Tensor, "blocks block_rank width"]) -> None:
        super().__init__()
        self.a = nn.Parameter(a.contiguous())
        self.b = nn.Parameter(b.contiguous())
        self.spec = BlockDenseSpec(shape=(a.shape[0], columns), blocks=b.shape[0], rank=a.shape[1])

    @classmethod
    def empty(cls, spec: BlockDenseSpec, dtype: torch.dtype, device: torch.device) -> BlockDense:
        return cls(
            spec.shape[1],
            torch.empty(spec.shape[0], spec.rank, dtype=dtype, device=device),
            torch.empty(spec.blocks, spec.rank // spec.blocks, spec.width, dtype=dtype, device=device),
        )

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        dtype, (rows, columns) = dtype or self.a.dtype, self.spec.shape
        a = self.a.to(dtype).reshape(rows, *self.b.shape[:2]).transpose(0, 1)
        return (a @ self.b.to(dtype)).transpose(0, 1).flatten(1)[:, :columns].contiguous()

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return linear(block_diagonal(x, self.b).flatten(-2), self.a)
