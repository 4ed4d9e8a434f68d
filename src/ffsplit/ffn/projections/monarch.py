"""Two block-diagonal matrices with a shuffle between and after them (Monarch, block-shuffle)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from ffsplit.ffn.projections.base import Projection, StorageSpec
from ffsplit.kernels.block_diagonal import block_diagonal
from ffsplit.ops.block_factors import block_size, whole_blocks


class MonarchSpec(StorageSpec):
    """``first [blocks, blocks * rank, in / blocks]`` and ``second [blocks, out / blocks, blocks * rank]``.

    As one matrix: a grid of ``blocks x blocks`` cells, each of rank ``rank``.

    Attributes:
        blocks: of the inputs and of the outputs; where they do not divide those, the sizes are rounded up, and what is
            filled up counts.
        rank: of a cell; 1 is Monarch as published, with ``blocks`` the root of the size.
    """

    kind: Literal["monarch"] = "monarch"
    blocks: int = Field(ge=1)
    rank: int = Field(ge=0)

    @model_validator(mode="after")
    def _whole(self) -> MonarchSpec:
        rows, columns = self.shape
        if self.blocks > min(rows, columns) or whole_blocks(columns, self.blocks) != self.blocks:
            raise ValueError(f"blocks={self.blocks} leaves an empty block of {columns} inputs or {rows} outputs")
        return self

    @property
    def height(self) -> int:
        """Outputs of a block."""
        return block_size(self.shape[0], self.blocks)

    @property
    def width(self) -> int:
        """Inputs of a block."""
        return block_size(self.shape[1], self.blocks)

    @property
    def parameters(self) -> int:
        return self.blocks**2 * self.rank * (self.height + self.width)

    def stored_bits(self, float_bits: int) -> int:
        return self.parameters * float_bits

    def describe(self) -> str:
        return f"Monarch, {self.blocks}x{self.blocks} blocks of rank {self.rank}"


class Monarch(Projection):
    """``W``: block-diagonal ``first``, shuffle, block-diagonal ``second``, shuffle.

    The shuffles hand every block of ``second`` as much of each block of ``first``, and spread its outputs evenly.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        first: Float[Tensor, "blocks inner width"],
        second: Float[Tensor, "blocks height inner"],
    ) -> None:
        super().__init__()
        self.first = nn.Parameter(first.contiguous())
        self.second = nn.Parameter(second.contiguous())
        blocks, inner, _ = first.shape
        self.spec = MonarchSpec(shape=shape, blocks=blocks, rank=inner // blocks)

    @classmethod
    def empty(cls, spec: MonarchSpec, dtype: torch.dtype, device: torch.device) -> Monarch:
        inner = spec.blocks * spec.rank
        return cls(
            spec.shape,
            torch.empty(spec.blocks, inner, spec.width, dtype=dtype, device=device),
            torch.empty(spec.blocks, spec.height, inner, dtype=dtype, device=device),
        )

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        dtype, spec = dtype or self.first.dtype, self.spec
        rows, columns = spec.shape
        # Cell (j, i) is the product over k of what the shuffle brings together.
        first = self.first.to(dtype).reshape(spec.blocks, spec.blocks, spec.rank, spec.width).transpose(0, 1)
        second = self.second.to(dtype).reshape(spec.blocks, spec.height, spec.rank, spec.blocks).permute(0, 3, 1, 2)
        cells = second @ first
        return cells.permute(2, 0, 1, 3).flatten(2).flatten(0, 1)[:rows, :columns].contiguous()

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        shuffled = block_diagonal(x, self.first).transpose(-1, -2).flatten(-2)
        outputs = block_diagonal(shuffled, self.second).transpose(-1, -2).flatten(-2)
        return outputs[..., : self.spec.shape[0]]
