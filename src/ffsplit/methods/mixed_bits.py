"""The n-way split: several widths in one FFN, the heaviest neurons in the most bits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import BudgetError
from ffsplit.ffn.projections.packed import ScaleBits
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.assemble import Part, fit_parts
from ffsplit.methods.budgets import FLOAT_BITS, packed_branch_spec, sum_spec
from ffsplit.methods.compressors import Rounding
from ffsplit.methods.neurons import ScoreName, neuron_order
from ffsplit.methods.registry import MethodConfig, method


class MixedBitsConfig(MethodConfig):
    """Which widths, and how many neurons each.

    Attributes:
        neurons: number of neurons of each width (2 to 8 bits, or 16 for dense), such as `{8: 64, 4: 640, 2: 832}`;
            neurons beyond their sum, the lightest, are dropped.
        score: what makes a neuron heavy.
        group: consecutive inputs that share a scale; counts that are multiples of it waste nothing.
        symmetric: no zero points.
        scale_bits: 16 for float16 scales, or 8 for multiples of a unit per row: 8 bits a group less, 16 a row more.
        polish: rounds of coordinate descent over scales and codes after GPTQ (ours; 0 is GPTQ as published).
        refit: least-squares fit of `down`, each width absorbing the error of the narrower ones.
        ridge: pull of that fit to the old weights.
    """

    method: Literal["mixed-bits"] = "mixed-bits"
    neurons: dict[int, int]
    score: ScoreName = "output_norm"
    group: int = Field(64, ge=8)
    symmetric: bool = False
    scale_bits: ScaleBits = 8
    polish: int = Field(3, ge=0)
    refit: bool = True
    ridge: float = Field(1e-3, ge=0)

    @field_validator("neurons")
    @classmethod
    def _possible(cls, neurons: dict[int, int]) -> dict[int, int]:
        """Widest first, as the branches are stored."""
        for bits, count in neurons.items():
            if bits != FLOAT_BITS and not 2 <= bits <= 8:
                raise ValueError(f"a width is 2 to 8 bits (codes) or 16 (dense), not {bits}")
            if count < 0:
                raise ValueError(f"{count} neurons of {bits} bits: a number of neurons is at least 0")
        if not any(neurons.values()):
            raise ValueError("no width has any neuron")
        return {bits: neurons[bits] for bits in sorted(neurons, reverse=True) if neurons[bits]}

    def quick(self) -> MixedBitsConfig:
        return self.model_copy(update={"polish": 0})


def structure(shape: FFNShape, config: MixedBitsConfig) -> SumSpec:
    """One branch a width.

    Raises:
        BudgetError: more neurons are asked for than there are.
    """
    if (asked := sum(config.neurons.values())) > shape.d_ff:
        raise BudgetError(f"neurons={config.neurons} are {asked}, and the FFN has d_ff={shape.d_ff}")
    how = (config.group, config.symmetric, config.scale_bits)
    branches = [packed_branch_spec(shape, count, bits, *how) for bits, count in config.neurons.items()]
    return sum_spec(shape, branches, bias=shape.down_bias)


@method(
    "mixed-bits",
    summary="any number of bit widths in one FFN, the heaviest neurons in the most bits",
    paper="FFSplit, arXiv 2401.04044, from two parts to any number; GPTQ, arXiv 2210.17323",
    budget=(),
    as_sum="one packed (or dense) branch a width",
    config=MixedBitsConfig,
    structure=structure,
    example={"neurons": {4: 768, 3: 768}},
)
def mixed_bits(data: LayerData, config: MixedBitsConfig) -> SumFFN:
    """Split by score, the narrowest branch fitted first, so that the wider ones absorb its error."""
    spec = structure(FFNShape.of(data.ffn), config)
    order = neuron_order(data, config.score, spec.neurons)
    parts, start = [], 0
    for branch in spec.branches:
        parts.append(Part(order[start : start + branch.neurons], branch, Rounding("gptq", config.polish)))
        start += branch.neurons
    return fit_parts(data, parts, spec, refit=config.refit, ridge=config.ridge)
