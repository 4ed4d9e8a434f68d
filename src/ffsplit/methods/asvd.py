"""Activation-aware SVD: inputs that are large on text count for more when the rank is cut."""

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
from ffsplit.methods.compressors import SVD, ScaledSVD
from ffsplit.methods.registry import KeepConfig, method


class ASVDConfig(KeepConfig):
    """How much an input's size counts.

    Attributes:
        alpha: input i is scaled by (mean of its absolute values) to this power before the SVD; 0 is the plain SVD.
        refit: fit `down` to the dense outputs on the hidden activations that the low-rank up and gate produce, before
            its own rank is cut. The paper has none.
        ridge: pull of that fit to the old weights.
    """

    method: Literal["asvd"] = "asvd"
    alpha: float = Field(0.5, ge=0)
    refit: bool = False
    ridge: float = Field(1e-3, ge=0)

    @property
    def needs_data(self) -> bool:
        return self.alpha > 0 or self.refit


def structure(shape: FFNShape, config: ASVDConfig) -> SumSpec:
    """One low-rank branch of all neurons, the same rank for every matrix."""
    rank = rank_for(shape, 0, keep_budget(shape, config.keep))
    return sum_spec(shape, [low_rank_branch_spec(shape, shape.d_ff, rank)], bias=shape.down_bias)


@method(
    "asvd",
    summary="SVD of every matrix with its inputs scaled by their mean absolute activation",
    paper="ASVD, arXiv 2312.05821",
    budget=("keep",),
    as_sum="one low-rank branch of all neurons",
    config=ASVDConfig,
    structure=structure,
)
def asvd(data: LayerData, config: ASVDConfig) -> SumFFN:
    """Each matrix on its own, scaled by the activations of the dense FFN."""
    spec = structure(FFNShape.of(data.ffn), config)
    neurons = torch.arange(data.ffn.d_ff, device=data.ffn.up.device)
    part = Part(neurons, spec.branches[0], SVD)
    if config.alpha > 0:
        # Sums over tokens instead of means: a common factor of all scales changes nothing.
        moments = data.moments
        inner, outer = moments.input_abs_sum**config.alpha, moments.hidden_abs_sum**config.alpha
        part = Part(neurons, spec.branches[0], ScaledSVD(inner), ScaledSVD(outer))
    return fit_parts(data, [part], spec, refit=config.refit, ridge=config.ridge)
