"""What a compressed FFN looks like, without its numbers: the structure that a checkpoint stores and budgets count.

A :class:`SumSpec` is enough to rebuild an empty :class:`~ffsplit.ffn.sum.SumFFN` and to say how many parameters and
bits it stores.
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt, model_validator

from ffsplit.ffn.lookup import LookupSpec
from ffsplit.ffn.projections import ProjectionSpec, StorageSpec
from ffsplit.ffn.projections.base import Spec
from ffsplit.ffn.selectors import SelectorSpec
from ffsplit.ffn.skips import SkipSpec


class BranchSpec(Spec):
    """A smaller FFN over some of the neurons, each projection in its own storage.

    Attributes:
        up: ``[neurons, d_model]``.
        down: ``[d_model, neurons]``.
        gate: ``[neurons, d_model]``, or None without a gate.
        up_bias: whether there is one.
        gate_bias: whether there is one.
        selector: which of the neurons work for a token; None: all of them, always.
        act: ``model`` for the model's activation, ``none`` for none.
    """

    up: ProjectionSpec
    down: ProjectionSpec
    gate: ProjectionSpec | None = None
    up_bias: bool = False
    gate_bias: bool = False
    selector: SelectorSpec | None = None
    act: Literal["model", "none"] = "model"

    @model_validator(mode="after")
    def _fits_together(self) -> BranchSpec:
        neurons, d_model = self.up.shape
        if self.down.shape != (d_model, neurons):
            raise ValueError(f"down has shape {self.down.shape}, up of shape {self.up.shape} needs its transpose")
        if self.gate is not None and self.gate.shape != self.up.shape:
            raise ValueError(f"gate has shape {self.gate.shape}, up has {self.up.shape}")
        if self.gate_bias and self.gate is None:
            raise ValueError("gate_bias is set and there is no gate")
        if self.selector is not None:
            self.selector.check(neurons, d_model)
        return self

    @property
    def neurons(self) -> int:
        return self.up.shape[0]

    @property
    def projections(self) -> tuple[StorageSpec, ...]:
        return tuple(p for p in (self.up, self.gate, self.down) if p is not None)

    @property
    def bias_parameters(self) -> int:
        return self.neurons * (self.up_bias + self.gate_bias)

    @property
    def selector_parameters(self) -> int:
        return 0 if self.selector is None else self.selector.parameters

    def describe(self) -> str:
        """How many neurons, and how their projections are stored, in a few words."""
        storages = [projection.describe() for projection in self.projections]
        names = ["up", "gate", "down"] if self.gate is not None else ["up", "down"]
        if len(set(storages)) == 1:
            how = storages[0]
        else:
            how = ", ".join(f"{name} {storage}" for name, storage in zip(names, storages, strict=True))
        selected = [] if self.selector is None else [self.selector.describe()]
        without = [] if self.act == "model" else ["no activation"]
        return ", ".join([f"{self.neurons:,} neurons", how, *without, *selected])

    @property
    def macs(self) -> float:
        """Multiply-accumulates of an average token: what the selector leaves out is not counted."""
        if self.selector is None:
            return float(sum(projection.macs for projection in self.projections))
        return self.selector.macs(self.up.macs, 0 if self.gate is None else self.gate.macs, self.down.macs)


class SumSpec(Spec):
    """A sum of branches, an optional linear map and an optional bias: ``sum_b branch_b(x) + linear(x) + bias``.

    Attributes:
        d_model: inputs and outputs.
        branches: heavy first.
        linear: a map of the input beside them.
        bias: whether there is one.
        lookup: tables beside them, indexed by hashes of the input.
        skip: which tokens do without all of it; None: no token does.
    """

    d_model: PositiveInt
    branches: tuple[BranchSpec, ...] = ()
    linear: ProjectionSpec | None = None
    bias: bool = False
    lookup: LookupSpec | None = None
    skip: SkipSpec | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> SumSpec:
        for name, term in (("skip", self.skip), ("lookup", self.lookup)):
            if term is not None and term.d_model != self.d_model:
                raise ValueError(f"{name} has d_model {term.d_model}, the sum {self.d_model}")
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
    def is_one_dense_branch(self) -> bool:
        """Whether this is an ordinary FFN, of some width, which plain transformers may have a place for."""
        return (
            len(self.branches) == 1
            and self.branches[0].selector is None
            and self.branches[0].act == "model"
            and all(projection.kind == "dense" for projection in self.projections)
            and self.linear is None
            and self.lookup is None
            and self.skip is None
        )

    @property
    def rounds_inputs(self) -> bool:
        """Whether a projection rounds its inputs at run time."""
        return any(projection.rounds_inputs for projection in self.projections)

    @property
    def projections(self) -> tuple[StorageSpec, ...]:
        inside = tuple(p for branch in self.branches for p in branch.projections)
        return inside if self.linear is None else (*inside, self.linear)

    @property
    def bias_parameters(self) -> int:
        return sum(branch.bias_parameters for branch in self.branches) + self.bias * self.d_model

    @property
    def parameters(self) -> int:
        """Stored numbers, biases included; a packed code counts as one."""
        return sum(p.parameters for p in self.projections) + self.bias_parameters + self._other_parameters

    @property
    def _other_parameters(self) -> int:
        """Of the tables, and of what decides at run time which work is done."""
        terms = [term.parameters for term in (self.lookup, self.skip) if term is not None]
        return sum(branch.selector_parameters for branch in self.branches) + sum(terms)

    @property
    def macs(self) -> float:
        """Multiply-accumulates of an average token."""
        macs = sum(branch.macs for branch in self.branches)
        macs += sum(term.macs for term in (self.linear, self.lookup) if term is not None)
        return macs if self.skip is None else self.skip.macs(macs)

    def stored_bits(self, float_bits: int = 16) -> int:
        """Stored bits, scales, zeros and biases included, when floating-point numbers take ``float_bits`` each."""
        numbers = self.bias_parameters + self._other_parameters
        return sum(p.stored_bits(float_bits) for p in self.projections) + numbers * float_bits

    def terms(self) -> tuple[str, ...]:
        """Each term of the sum in a few words, heavy neurons first; empty for a dropped FFN."""
        skip = () if self.skip is None else (self.skip.describe(),)
        return (*self._summands(), *skip)

    def _summands(self) -> tuple[str, ...]:
        linear = () if self.linear is None else (f"linear map, {self.linear.describe()}",)
        lookup = () if self.lookup is None else (self.lookup.describe(),)
        return (*(branch.describe() for branch in self.branches), *linear, *lookup)

    def describe(self) -> str:
        """The sum in words."""
        total = " + ".join(self._summands()) or ("constant" if self.bias else "dropped")
        return total if self.skip is None else f"{total}, {self.skip.describe()}"
