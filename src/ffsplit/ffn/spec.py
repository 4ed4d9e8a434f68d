"""What a compressed FFN looks like, without its numbers: the structure that a checkpoint stores and budgets count.

A :class:`SumSpec` is enough to rebuild an empty :class:`~ffsplit.ffn.sum.SumFFN` and to say how many parameters and
bits it stores.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from ffsplit.ops.packing import packed_columns

SCALE_BITS = 16
Shape = tuple[NonNegativeInt, NonNegativeInt]
"""``[out, in]``."""


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DenseSpec(_Spec):
    """A plain matrix ``[out, in]``."""

    kind: Literal["dense"] = "dense"
    shape: Shape

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    def stored_bits(self, float_bits: int) -> int:
        return self.parameters * float_bits


class LowRankSpec(_Spec):
    """``a b`` with ``a [out, rank]`` and ``b [rank, in]``."""

    kind: Literal["low_rank"] = "low_rank"
    shape: Shape
    rank: int = Field(ge=0)

    @property
    def parameters(self) -> int:
        return self.rank * (self.shape[0] + self.shape[1])

    def stored_bits(self, float_bits: int) -> int:
        return self.parameters * float_bits


class PackedSpec(_Spec):
    """Codes of ``bits`` bits in groups along the input dimension, each group with a float16 scale and a zero."""

    kind: Literal["packed"] = "packed"
    shape: Shape
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

    @model_validator(mode="after")
    def _fits_together(self) -> BranchSpec:
        neurons, d_model = self.up.shape
        if self.down.shape != (d_model, neurons):
            raise ValueError(f"down has shape {self.down.shape}, up of shape {self.up.shape} needs its transpose")
        if self.gate is not None and self.gate.shape != self.up.shape:
            raise ValueError(f"gate has shape {self.gate.shape}, up has {self.up.shape}")
        if self.gate_bias and self.gate is None:
            raise ValueError("gate_bias is set and there is no gate")
        return self

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

    d_model: PositiveInt
    branches: tuple[BranchSpec, ...] = ()
    linear: ProjectionSpec | None = None
    bias: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> SumSpec:
        for branch in self.branches:
            if branch.up.shape[1] != self.d_model:
                raise ValueError(f"a branch takes {branch.up.shape[1]} inputs and d_model is {self.d_model}")
        if self.linear is not None and self.linear.shape != (self.d_model, self.d_model):
            raise ValueError(f"linear has shape {self.linear.shape} and d_model is {self.d_model}")
        return self

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
