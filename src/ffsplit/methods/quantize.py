"""One precision for the whole FFN: round-to-nearest, AWQ or GPTQ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import BudgetError
from ffsplit.ffn.projections import OutlierColumnsSpec, OutlierWeightsSpec, PackedSpec, StorageSpec
from ffsplit.ffn.projections.packed import ScaleBits
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.assemble import Part, fit_parts
from ffsplit.methods.budgets import FLOAT_BITS, average_bits, packed_branch_spec, sum_spec
from ffsplit.methods.compressors import RoundHow, Rounding
from ffsplit.methods.registry import MethodConfig, method
from ffsplit.ops.input_scale import search_input_scale


class QuantizeConfig(MethodConfig):
    """Exactly one of ``bits`` (everything counted) and ``code_bits`` must be given.

    Attributes:
        bits: average stored bits per weight, scales, zeros and biases included; the widest codes that fit are taken.
        code_bits: bits of a code, 2 to 8, whatever the total comes to.
        rounding: ``gptq``, ``awq`` (to nearest, with searched input scales and ranges) or ``rtn`` (to nearest).
        scale_search: factors of the input columns, searched as AWQ does, so that large inputs meet fine steps; those of
            `down` go into `up` where that is exact. None means with ``awq`` only; ``gptq`` can have them too.
        group: consecutive inputs that share a scale.
        symmetric: no zero points.
        scale_bits: 16 for float16 scales, or 8 for multiples of a unit per row: 8 bits a group less, 16 a row more.
        outliers: share of the input columns of every matrix that stay in 16 bits: those that rounding would hurt most
            (of `down`, columns are neurons: its heavy neurons), refitted to absorb the error of the others (OWQ).
        outlier_weights: share of the single weights of every matrix that get a 16-bit number on top of their code, for
            what sticks out of their group's range: those that rounding would hurt most even if others adapt (SpQR).
        polish: rounds of coordinate descent over scales and codes after GPTQ (ours; 0 is GPTQ as published).
        refit: least-squares fit of `down` on the quantised activations before it is quantised itself.
        ridge: pull of that fit to the old weights.
    """

    instead_of_budget: ClassVar[tuple[str, ...]] = ("code_bits",)

    method: Literal["quantize"] = "quantize"
    bits: float | None = Field(None, gt=0, le=FLOAT_BITS)
    code_bits: int | None = Field(None, ge=2, le=8)
    rounding: RoundHow = "gptq"
    scale_search: bool | None = None
    group: int = Field(64, ge=8)
    symmetric: bool = False
    scale_bits: ScaleBits = 16
    outliers: float = Field(0, ge=0, lt=1)
    outlier_weights: float = Field(0, ge=0, lt=1)
    polish: int = Field(3, ge=0)
    refit: bool = True
    ridge: float = Field(1e-2, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _data_free(cls, values: Any) -> Any:
        """Round-to-nearest has no refit unless asked for (and then refused), so that a stored recipe says so."""
        return {"refit": False, **values} if isinstance(values, dict) and values.get("rounding") == "rtn" else values

    @model_validator(mode="after")
    def _one_budget(self) -> QuantizeConfig:
        if (self.bits is None) == (self.code_bits is None):
            raise ValueError("give exactly one of bits and code_bits")
        if self.outliers and self.outlier_weights:
            raise ValueError("give either outliers (whole columns) or outlier_weights (single weights)")
        if self.refit and self.rounding == "rtn":
            raise ValueError("refit needs rounding: gptq or awq (round-to-nearest is the data-free baseline)")
        if self.scale_search and self.rounding == "rtn":
            raise ValueError("scale_search needs rounding: gptq or awq (round-to-nearest is the data-free baseline)")
        return self

    @property
    def needs_data(self) -> bool:
        return self.rounding != "rtn"

    @property
    def scaled(self) -> bool:
        """Whether input columns are scaled, with the default of the rounding."""
        return self.rounding == "awq" if self.scale_search is None else self.scale_search

    @property
    def full_budget(self) -> bool:
        return self.bits == FLOAT_BITS

    def quick(self) -> QuantizeConfig:
        return self.model_copy(update={"polish": 0})


def structure(shape: FFNShape, config: QuantizeConfig) -> SumSpec:
    """One packed branch of all neurons.

    Raises:
        BudgetError: even 2-bit codes with their scales are above the budget.
    """
    widths = range(8, 1, -1) if config.code_bits is None else (config.code_bits,)
    for code_bits in widths:
        branch = packed_branch_spec(
            shape,
            shape.d_ff,
            code_bits,
            config.group,
            config.symmetric,
            config.scale_bits,
            input_scale=config.scaled,
            outliers=config.outliers,
            outlier_weights=config.outlier_weights,
        )
        spec = sum_spec(shape, [branch], bias=shape.down_bias)
        if config.bits is None or average_bits(spec, shape) <= config.bits:
            return spec
    raise BudgetError(
        f"bits={config.bits} is out of reach with groups of {config.group}; the smallest reachable is "
        f"{average_bits(spec, shape):.3f} bits (2-bit codes with their scales and zeros)"
    )


@method(
    "quantize",
    summary="one bit width for all neurons, by round-to-nearest, AWQ or GPTQ",
    paper="GPTQ, arXiv 2210.17323; AWQ, arXiv 2306.00978; OWQ, arXiv 2306.02272, SpQR, arXiv 2306.03078 (outliers)",
    budget=("bits",),
    as_sum="one packed branch of all neurons",
    config=QuantizeConfig,
    structure=structure,
)
def quantize(data: LayerData, config: QuantizeConfig) -> SumFFN:
    """Up and gate first, then `down` on the activations that they really give."""
    spec = structure(FFNShape.of(data.ffn), config)
    if config.scaled and FFNShape.of(data.ffn).scales_through:
        data = _folded(data, spec.branches[0].down)
    neurons = torch.arange(data.ffn.d_ff, device=data.ffn.up.device)
    part = Part(neurons, spec.branches[0], Rounding(config.rounding, config.polish))
    return fit_parts(data, [part], spec, refit=config.refit, ridge=config.ridge)


def _folded(data: LayerData, down: StorageSpec) -> LayerData:
    """The same FFN with the input scales of `down` in the rows of `up`, exactly: they are powers of two."""
    down = down.packed if isinstance(down, OutlierColumnsSpec | OutlierWeightsSpec) else down
    assert isinstance(down, PackedSpec)
    ffn = data.ffn
    factor = search_input_scale(
        ffn.down.float(),
        data.statistics.hidden_gram,
        down.bits,
        down.group,
        symmetric=down.symmetric,
        scale_bits=down.scale_bits,
        powers_of_two=True,
    ).to(ffn.up)
    bias = None if ffn.up_bias is None else ffn.up_bias * factor
    scaled = replace(ffn, up=ffn.up * factor[:, None], up_bias=bias, down=ffn.down / factor)
    return replace(data, ffn=scaled)
