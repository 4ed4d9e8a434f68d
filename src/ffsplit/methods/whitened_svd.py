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


class WhitenedSVDConfig(KeepConfig):
    """How `down` is fitted.

    Attributes:
        refit: fit `down` to the dense outputs on the hidden activations that the low-rank up and gate produce, before
            its own rank is cut; False approximates each matrix on its dense inputs, as SVD-LLM does.
        ridge: pull of that fit to the old weights.
    """

    method: Literal["whitened-svd"] = "whitened-svd"
    refit: bool = True
    ridge: float = Field(1e-3, ge=0)


def structure(shape: FFNShape, config: WhitenedSVDConfig) -> SumSpec:
    """One low-rank branch of all neurons, the same rank for every matrix."""
    rank = rank_for(shape, 0, keep_budget(shape, config.keep))
    return sum_spec(shape, [low_rank_branch_spec(shape, shape.d_ff, rank)], bias=shape.down_bias)


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
    """All matrices at one rank, each optimal for its inputs."""
    spec = structure(FFNShape.of(data.ffn), config)
    neurons = torch.arange(data.ffn.d_ff, device=data.ffn.up.device)
    part = Part(neurons, spec.branches[0], WHITENED)
    return fit_parts(data, [part], spec, refit=config.refit, ridge=config.ridge)
