"""FFSplit: the heavy hitters keep their resources, the rest of the FFN gets fewer (arXiv 2401.04044)."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import BudgetError
from ffsplit.ffn.projections.packed import ScaleBits
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import BranchSpec, SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.assemble import Part, fit_parts
from ffsplit.methods.blockwise import BlockStructure, BlockwiseFit, blockwise_branch_spec
from ffsplit.methods.budgets import (
    FLOAT_BITS,
    average_bits,
    dense_branch_spec,
    heavy_beside_rank,
    heavy_count,
    keep_budget,
    low_rank_branch_spec,
    packed_branch_spec,
    rank_for,
    sum_spec,
    to_nearest,
)
from ffsplit.methods.compressors import SVD, WHITENED, Compressor, Rounding
from ffsplit.methods.heavy_map import heavy_and_map
from ffsplit.methods.neurons import ScoreName, neuron_order
from ffsplit.methods.registry import MethodConfig, method

Rest = Literal["svd", "whitened", "block-dense", "monarch", "linear", "rtn", "gptq"]
BLOCKWISE: frozenset[str] = frozenset(get_args(BlockStructure))
LOW_BIT: frozenset[str] = frozenset({"rtn", "gptq"})
DEFAULT_HEAVY = {"svd": 0.3, "whitened": 0.35, "block-dense": 0.35, "monarch": 0.35}


class FFSplitConfig(MethodConfig):
    """What the heavy hitters keep and what the rest gets.

    Attributes:
        keep: share of the FFN's parameters that stay; the rest is then low rank or a linear map.
        bits: average stored bits per weight, everything counted; the rest is then low-bit.
        score: what makes a neuron heavy; None means ``output_norm`` (the paper's eq. 3), but ``greedy_obs`` when the
            rest becomes a linear map, because then the heavy neurons also have to stand in for the others.
        heavy: share (below 1) or number of heavy neurons; None lets the budget decide.
        heavy_bits: 16 (dense), or the bits of the heavy codes; 16 with ``keep``, 8 with ``bits`` unless set.
        rest: how the rest is compressed: ``svd`` or ``whitened`` (low rank), ``block-dense`` or ``monarch`` (block
            diagonal), ``linear`` (the rest becomes one low-rank linear map of the input), ``gptq`` or ``rtn`` (low
            bit).
        blocks: of each matrix of a ``block-dense`` or ``monarch`` rest.
        rest_bits: bits of the rest's codes; None takes the widest that fit.
        group: consecutive inputs that share a scale; the heavy count is a multiple of it.
        symmetric: no zero points.
        scale_bits: 16 for float16 scales, or 8 for multiples of a unit per row: 8 bits a group less, 16 a row more.
        polish: rounds of coordinate descent over scales and codes after GPTQ (ours; 0 is GPTQ as published).
        refit: least-squares fit of `down`, the heavy part absorbing the error of the rest. The paper has none.
        ridge: pull of that fit to the old weights.
        align: with a low-rank or linear rest, the heavy count and the rank are multiples of this (GPUs like 64 or 128,
            CPUs 16): the count is rounded, the rank rounded down, and what that leaves goes to more heavy neurons.

    Raises (through pydantic): a value out of range, both or neither of the budgets, or a rest that does not fit the
    budget's kind.
    """

    method: Literal["ffsplit"] = "ffsplit"
    keep: float | None = Field(None, gt=0, le=1)
    bits: float | None = Field(None, gt=0, le=FLOAT_BITS)
    score: ScoreName | None = None
    heavy: float | None = Field(None, ge=0)
    heavy_bits: int | None = Field(None, ge=2, le=FLOAT_BITS)
    rest: Rest | None = None
    blocks: int = Field(4, ge=1)
    rest_bits: int | None = Field(None, ge=2, le=8)
    group: int = Field(64, ge=8)
    symmetric: bool = False
    scale_bits: ScaleBits = 16
    polish: int = Field(3, ge=0)
    refit: bool = True
    ridge: float = Field(1e-3, ge=0)
    align: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> FFSplitConfig:
        if (self.keep is None) == (self.bits is None):
            raise ValueError(
                "give exactly one budget: keep (the rest becomes low rank) or bits (the rest gets few bits)"
            )
        low_bit = self.compressor in LOW_BIT
        if low_bit != (self.bits is not None):
            raise ValueError(
                f"rest={self.compressor!r} goes with {'bits' if low_bit else 'keep'}; with keep use svd, whitened, "
                "block-dense, monarch or linear, with bits use gptq or rtn"
            )
        if self.keep is not None and self.heavy_bits not in (None, FLOAT_BITS):
            raise ValueError("heavy_bits below 16 needs the bits budget")
        if self.compressor == "linear" and not self.refit:
            raise ValueError("rest='linear' is itself a least-squares fit; it needs refit: true")
        if self.align != 1 and (low_bit or self.compressor in BLOCKWISE):
            raise ValueError(
                f"align={self.align} goes with rest svd, whitened or linear; rest={self.compressor!r} has its own grid "
                f"({'group' if low_bit else 'blocks'})"
            )
        if self.heavy is not None and self.heavy >= 1 and self.heavy != int(self.heavy):
            raise ValueError("heavy is a share below 1 or a whole number of neurons")
        if self.heavy_bits is not None and 8 < self.heavy_bits < FLOAT_BITS:
            raise ValueError("heavy_bits is 2 to 8 (codes) or 16 (dense)")
        return self

    @property
    def compressor(self) -> Rest:
        """The rest's compressor, with the default of the budget's kind."""
        if self.rest is not None:
            return self.rest
        return "linear" if self.keep is not None else "gptq"

    @property
    def ranking(self) -> ScoreName:
        """The score, with its default."""
        if self.score is not None:
            return self.score
        return "greedy_obs" if self.compressor == "linear" else "output_norm"

    @property
    def full_budget(self) -> bool:
        return self.keep == 1 or self.bits == FLOAT_BITS

    def quick(self) -> FFSplitConfig:
        return self.model_copy(update={"polish": 0})


def structure(shape: FFNShape, config: FFSplitConfig) -> SumSpec:
    """A heavy branch and a rest branch (or a linear map) that together meet the budget exactly or from below."""
    if config.keep is None:
        return _low_bit_structure(shape, config)
    if config.compressor == "linear":
        return heavy_and_map(shape, config.keep, config.heavy, bias=shape.down_bias, align=config.align)
    budget = keep_budget(shape, config.keep)
    if config.heavy is None:
        heavy = heavy_count(shape, DEFAULT_HEAVY[config.compressor] * config.keep) // config.align * config.align
    else:
        heavy = to_nearest(heavy_count(shape, config.heavy), config.align, shape.d_ff)
    if config.compressor == "block-dense" or config.compressor == "monarch":
        rest = blockwise_branch_spec(config.compressor, shape, heavy, config.blocks, budget)
    else:
        rank = rank_for(shape, heavy, budget, config.align)
        if config.align > 1:
            heavy = heavy_beside_rank(shape, heavy, rank, budget, config.align)
        rest = low_rank_branch_spec(shape, shape.d_ff - heavy, rank)
    return sum_spec(shape, [dense_branch_spec(shape, heavy), rest], bias=shape.down_bias)


def _low_bit_structure(shape: FFNShape, config: FFSplitConfig) -> SumSpec:
    """The widest rest codes that fit, then as many heavy neurons as the remaining bits pay for."""
    assert config.bits is not None
    counts = _heavy_counts(shape, config)
    smallest = float(FLOAT_BITS)
    for rest_bits in range(8, 1, -1) if config.rest_bits is None else (config.rest_bits,):
        for heavy in counts:
            spec = _low_bit_spec(shape, config, heavy, rest_bits)
            bits = average_bits(spec, shape)
            smallest = min(smallest, bits)
            if bits <= config.bits:
                return spec
    raise BudgetError(
        f"bits={config.bits} is out of reach with groups of {config.group} and {config.heavy_bits or 8}-bit heavy "
        f"neurons; the smallest reachable is {smallest:.3f}"
    )


def _heavy_counts(shape: FFNShape, config: FFSplitConfig) -> list[int]:
    """Candidate numbers of heavy neurons, the largest first, aligned to the groups of `down`."""
    align = min(config.group, shape.d_ff)
    if config.heavy is None:
        return list(range(shape.d_ff // align * align, -1, -align))
    return [min(round(heavy_count(shape, config.heavy) / align) * align, shape.d_ff)]


def _low_bit_spec(shape: FFNShape, config: FFSplitConfig, heavy: int, rest_bits: int) -> SumSpec:
    def branch(neurons: int, bits: int) -> BranchSpec:
        return packed_branch_spec(shape, neurons, bits, config.group, config.symmetric, config.scale_bits)

    branches = [branch(heavy, config.heavy_bits or 8)] if heavy else []
    if heavy < shape.d_ff:
        branches.append(branch(shape.d_ff - heavy, rest_bits))
    return sum_spec(shape, branches, bias=shape.down_bias)


@method(
    "ffsplit",
    summary="heavy hitters exact (or in more bits), the rest low rank, linear or low-bit",
    paper="FFSplit, arXiv 2401.04044",
    budget=("keep", "bits"),
    as_sum="heavy: dense or int8 + rest: low rank, linear map or int4/int3/int2",
    config=FFSplitConfig,
    structure=structure,
)
def ffsplit(data: LayerData, config: FFSplitConfig) -> SumFFN:
    """Split by score, compress the rest, let the heavy part absorb the error."""
    spec = structure(FFNShape.of(data.ffn), config)
    heavy = _heavy_neurons(spec, data.ffn.d_ff, linear=config.compressor == "linear")
    order = neuron_order(data, config.ranking, heavy)
    parts, start = [], 0
    for branch in spec.branches:
        parts.append(Part(order[start : start + branch.neurons], branch, _algorithm(config)))
        start += branch.neurons
    return fit_parts(data, parts, spec, refit=config.refit, ridge=config.ridge)


def _algorithm(config: FFSplitConfig) -> Compressor:
    if config.compressor == "rtn" or config.compressor == "gptq":
        return Rounding(config.compressor, config.polish)
    if config.compressor in BLOCKWISE:
        return BlockwiseFit(ridge=config.ridge)
    return SVD if config.compressor == "svd" else WHITENED


def _heavy_neurons(spec: SumSpec, d_ff: int, *, linear: bool) -> int:
    """Neurons of the heavy branch; zero when the only branch is the rest."""
    if linear:
        return spec.neurons
    if len(spec.branches) > 1:
        return spec.branches[0].neurons
    return 0 if spec.neurons == d_ff else spec.neurons
