"""What a compressed FFN looks like, without its numbers: the structure that a checkpoint stores and budgets count.

A :class:`SumSpec` is enough to rebuild an empty :class:`~ffsplit.ffn.sum.SumFFN` and to say how many parameters and
bits it stores.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ffsplit.ops.packing import packed_columns

SCALE_BITS = 16


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DenseSpec(_Spec):
    """A plain matrix ``[out, in]``."""

    kind: Literal["dense"] = "dense"
    shape: tuple[int, int]

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    def stored_bits(self, float_bits: int) -> int:
        return self.parameters * float_bits


class LowRankSpec(_Spec):
    """``a b`` with ``a [out, rank]`` and ``b [rank, in]``."""

    kind: Literal["low_rank"] = "low_rank"
    shape: tuple[int, int]
    rank: int = Field(ge=0)

    @property
    def parameters(self) -> int:
        return self.rank * (self.shape[0] + self.shape[1])

    def stored_bits(self, float_bits: int) -> int:
        return self.parameters * float_bits


class PackedSpec(_Spec):
    """Codes of ``bits`` bits in groups along the input dimension, each group with a float16 scale and a zero."""

    kind: Literal["packed"] = "packed"
    shape: tuple[int, int]
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


ProjectionSpec = Annotated[DenseSpec | LowRankSpec | PackedSpec, Field(discriminator="kind")]


class BranchSpec(_Spec):
    """A smaller FFN over some of the neurons."""

    up: ProjectionSpec
    down: ProjectionSpec
    gate: ProjectionSpec | None = None
    up_bias: bool = False
    gate_bias: bool = False

    @property
    def neurons(self) -> int:
        return self.up.shape[0]

    @property
    def projections(self) -> tuple[DenseSpec | LowRankSpec | PackedSpec, ...]:
        return tuple(p for p in (self.up, self.gate, self.down) if p is not None)

    @property
    def bias_parameters(self) -> int:
        return self.neurons * (self.up_bias + self.gate_bias)


class SumSpec(_Spec):
    """A sum of branches, an optional linear map and an optional bias: ``sum_b branch_b(x) + linear(x) + bias``."""

    d_model: int
    branches: tuple[BranchSpec, ...] = ()
    linear: ProjectionSpec | None = None
    bias: bool = False

    @property
    def neurons(self) -> int:
        return sum(branch.neurons for branch in self.branches)

    @property
    def projections(self) -> tuple[DenseSpec | LowRankSpec | PackedSpec, ...]:
        inside = tuple(p for branch in self.branches for p in branch.projections)
        return inside if self.linear is None else (*inside, self.linear)

    @property
    def bias_parameters(self) -> int:
        return sum(branch.bias_parameters for branch in self.branches) + self.bias * self.d_model

    @property
    def parameters(self) -> int:
        """Stored numbers, biases included; a packed code counts as one."""
        return sum(p.parameters for p in self.projections) + self.bias_parameters

    def stored_bits(self, float_bits: int = 16) -> int:
        """Stored bits, scales, zeros and biases included, when floating-point numbers take ``float_bits`` each."""
        return sum(p.stored_bits(float_bits) for p in self.projections) + self.bias_parameters * float_bits
