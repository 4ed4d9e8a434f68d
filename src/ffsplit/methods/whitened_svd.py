"""SVD that minimises the error of each matrix's *outputs* on calibration inputs instead of the error of its weights."""

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
from ffsplit.methods.compressors import WHITENED
from ffsplit.methods.registry import KeepConfig, method
from ffsplit.ops.ranks import weighted_ranks


class WhitenedSVDConfig(KeepConfig):
    """How the ranks are divided and `down` is fitted.

    Attributes:
        rank_up: rank of `up` in proportion to the others'. Equal numbers give all matrices the same rank.
        rank_gate: the same for the gate; without a gate it has no meaning.
        rank_down: the same for `down`.
        refit: fit `down` to the dense outputs on the hidden activations that the low-rank up and gate produce, before
            its own rank is cut; False approximates each matrix on its dense inputs, as SVD-LLM does.
        ridge: pull of that fit to the old weights.
    """

    method: Literal["whitened-svd"] = "whitened-svd"
    rank_up: float = Field(1.0, gt=0)
    rank_gate: float = Field(1.0, gt=0)
    rank_down: float = Field(1.0, gt=0)
    refit: bool = True
    ridge: float = Field(1e-3, ge=0)


def structure(shape: FFNShape, config: WhitenedSVDConfig) -> SumSpec:
    """One low-rank branch of all neurons, the ranks in the proportion that is set."""
    budget = keep_budget(shape, config.keep)
    rank_for(shape, 0, budget)  # refuses a budget in which not every matrix gets rank 1
    weights = [config.rank_up, *([config.rank_gate] if shape.gated else []), config.rank_down]
    limits = [min(shape.d_ff, shape.d_model)] * shape.matrices
    costs = [shape.d_ff + shape.d_model] * shape.matrices
    up, *gate, down = weighted_ranks(weights, limits, costs, budget - (shape.parameters - shape.weights))
    branch = low_rank_branch_spec(shape, shape.d_ff, up, gate_rank=gate[0] if gate else None, down_rank=down)
    return sum_spec(shape, [branch], bias=shape.down_bias)


@method(
    "whitened-svd",
    summary="SVD weighted by the Gram of each matrix's inputs, `down` refitted on the compressed activations",
    paper="SVD-LLM, arXiv 2403.07378; DRONE",
    budget=("keep",),
    as_sum="one low-rank branch of all neurons",
    config=WhitenedSVDConfig,
    structure=structure,
)
def whitened_svd(data: LayerData, config: WhitenedSVDConfig) -> SumFFN:
    """Each matrix at its rank, optimal for its inputs."""
    spec = structure(FFNShape.of(data.ffn), config)
    neurons = torch.arange(data.ffn.d_ff, device=data.ffn.up.device)
    part = Part(neurons, spec.branches[0], WHITENED)
    return fit_parts(data, [part], spec, refit=config.refit, ridge=config.ridge)
