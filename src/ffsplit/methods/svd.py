"""Plain truncated SVD of every matrix of the FFN: the baseline that FFSplit's paper beats."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.assemble import Part, fit_parts
from ffsplit.methods.budgets import keep_budget, low_rank_branch_spec, rank_for, sum_spec
from ffsplit.methods.compressors import SVD
from ffsplit.methods.registry import KeepConfig, method


class SVDConfig(KeepConfig):
    """Nothing to set but the budget and what hardware likes.

    Attributes:
        align: the rank is a multiple of this, rounded down (GPUs like 64 or 128, CPUs 16).
    """

    method: Literal["svd"] = "svd"
    align: int = Field(default=1, ge=1)

    @property
    def needs_data(self) -> bool:
        return False


def structure(shape: FFNShape, config: SVDConfig) -> SumSpec:
    """One low-rank branch of all neurons, the same rank for every matrix."""
    rank = rank_for(shape, 0, keep_budget(shape, config.keep), config.align)
    return sum_spec(shape, [low_rank_branch_spec(shape, shape.d_ff, rank)], bias=shape.down_bias)


@method(
    "svd",
    summary="truncated SVD of every matrix",
    paper="Eckart & Young 1936",
    budget=("keep",),
    as_sum="one low-rank branch of all neurons",
    config=SVDConfig,
    structure=structure,
)
def svd(data: LayerData, config: SVDConfig) -> SumFFN:
    """Each matrix on its own, no data."""
    spec = structure(FFNShape.of(data.ffn), config)
    neurons = torch.arange(data.ffn.d_ff, device=data.ffn.up.device)
    return fit_parts(data, [Part(neurons, spec.branches[0], SVD)], spec, refit=False, ridge=0.0)
