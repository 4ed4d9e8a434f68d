"""Block-diagonal structures (block-dense, Monarch): how large they may be under a budget, and how they are fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import BudgetError
from ffsplit.ffn.projections import BlockDense, BlockDenseSpec, Monarch, MonarchSpec, Projection, StorageSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import BranchSpec, SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.assemble import Part, fit_parts
from ffsplit.methods.budgets import keep_budget, sum_spec
from ffsplit.methods.compressors import Compressor, GramOfInputs
from ffsplit.methods.registry import KeepConfig
from ffsplit.ops.block_factors import block_dense_factors, monarch_factors, whole_blocks
from ffsplit.ops.linalg import ridged

BlockStructure = Literal["block-dense", "monarch"]
SWEEPS = 8


class BlockwiseConfig(KeepConfig):
    """How many blocks, and how their numbers are fitted.

    Attributes:
        sweeps: rounds of alternating fits that lower the error of each matrix's outputs on text (ours); 0 leaves every
            block at its SVD, which needs no text.
        refit: fit `down` to the dense outputs on the hidden activations that the compressed up and gate produce,
            before it is compressed itself.
        ridge: pull of the refit to the old weights, and of the sweeps to the weights that they are given.
    """

    blocks: int = Field(4, ge=1)
    sweeps: int = Field(SWEEPS, ge=0)
    refit: bool = True
    ridge: float = Field(1e-3, ge=0)

    @property
    def needs_data(self) -> bool:
        return self.refit or self.sweeps > 0


@dataclass(frozen=True)
class BlockwiseFit(Compressor):
    """The SVD of every block or cell, then sweeps that lower the error of the outputs.

    Attributes:
        sweeps: at most so many; 0 is the projection that needs no data.
        ridge: pull of the sweeps to the given weights, relative to the mean diagonal of the Gram. What one block leaves
            to another is divided by that one's Gram, which would fit the noise of rare directions without it.
    """

    sweeps: int = SWEEPS
    ridge: float = 1e-3

    @property
    def needs_gram(self) -> bool:
        return self.sweeps > 0

    def fit(
        self, weights: Sequence[Tensor], spec: StorageSpec, gram: GramOfInputs, dtype: torch.dtype
    ) -> list[Projection]:
        pulled = ridged(gram, self.ridge) if self.needs_gram and gram is not None else None
        return [self._fit(weight, spec, pulled, dtype) for weight in weights]

    def _fit(self, weight: Tensor, spec: StorageSpec, gram: GramOfInputs, dtype: torch.dtype) -> Projection:
        if isinstance(spec, BlockDenseSpec):
            a, b = block_dense_factors(weight, spec.blocks, spec.rank // spec.blocks, gram, self.sweeps)
            return BlockDense(spec.shape[1], a.to(dtype), b.to(dtype))
        assert isinstance(spec, MonarchSpec)
        first, second = monarch_factors(weight, spec.blocks, spec.rank, gram, self.sweeps)
        return Monarch(spec.shape, first.to(dtype), second.to(dtype))


def blockwise_structure(kind: BlockStructure, shape: FFNShape, config: BlockwiseConfig) -> SumSpec:
    """One branch of all neurons."""
    branch = blockwise_branch_spec(kind, shape, 0, config.blocks, keep_budget(shape, config.keep))
    return sum_spec(shape, [branch], bias=shape.down_bias)


def fit_blockwise(data: LayerData, config: BlockwiseConfig, spec: SumSpec) -> SumFFN:
    """Up and gate first, then `down` on the activations that they give."""
    neurons = torch.arange(data.ffn.d_ff, device=data.ffn.up.device)
    part = Part(neurons, spec.branches[0], BlockwiseFit(config.sweeps, config.ridge))
    return fit_parts(data, [part], spec, refit=config.refit, ridge=config.ridge)


def blockwise_spec(
    kind: BlockStructure, rows: int, columns: int, blocks: int, rank: int
) -> BlockDenseSpec | MonarchSpec:
    """A matrix whose blocks (cells) have rank ``rank``; fewer blocks where some would be empty."""
    shape = (rows, columns)
    if kind == "block-dense":
        whole = whole_blocks(columns, blocks)
        return BlockDenseSpec(shape=shape, blocks=whole, rank=rank * whole)
    return MonarchSpec(shape=shape, blocks=whole_blocks(columns, min(blocks, rows)), rank=rank)


def blockwise_branch_spec(
    kind: BlockStructure, shape: FFNShape, heavy: int, blocks: int, parameters: int
) -> BranchSpec:
    """The branch of all neurons but ``heavy`` dense ones, with as much rank as ``parameters`` pay for beside those.

    Every matrix gets the same share of the parameters, as an equal rank gives them in a low-rank branch; what rounding
    leaves over goes to `down` first.

    Raises:
        BudgetError: rank 1 in every block is too much.
    """
    neurons = max(shape.d_ff - heavy, 1)  # heavy neurons alone are above every budget but the full one
    pairs = shape.matrices - 1

    def inner(rank: int) -> BlockDenseSpec | MonarchSpec:
        return blockwise_spec(kind, neurons, shape.d_model, blocks, rank)

    def outer(rank: int) -> BlockDenseSpec | MonarchSpec:
        return blockwise_spec(kind, shape.d_model, neurons, blocks, rank)

    fixed = shape.d_model * shape.down_bias + neurons * shape.neuron_biases + heavy * shape.neuron_parameters
    left, inner_cost, outer_cost = parameters - fixed, pairs * inner(1).parameters, outer(1).parameters
    if left < inner_cost + outer_cost:
        smallest = (fixed + inner_cost + outer_cost) / shape.parameters
        raise BudgetError(
            f"keep leaves no rank for {inner(1).blocks} blocks beside {heavy} dense heavy neurons of "
            f"d_ff={shape.d_ff}; the smallest reachable keep is {smallest:.4f} (or set fewer `blocks`)"
        )
    share = max(left * pairs // shape.matrices // inner_cost, 1)
    rank = min(share, (left - outer_cost) // inner_cost, _full_rank(inner(1)))
    outer_rank = min((left - rank * inner_cost) // outer_cost, _full_rank(outer(1)))
    rank = min((left - outer_rank * outer_cost) // inner_cost, _full_rank(inner(1)))
    return BranchSpec(
        up=inner(rank),
        gate=inner(rank) if shape.gated else None,
        down=outer(outer_rank),
        up_bias=shape.up_bias,
        gate_bias=shape.gate_bias,
    )


def _full_rank(spec: BlockDenseSpec | MonarchSpec) -> int:
    """The rank that a block (a cell) can have."""
    return min(spec.width, spec.height if isinstance(spec, MonarchSpec) else spec.shape[0])
