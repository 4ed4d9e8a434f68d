"""Float8 for the weights, and for the activations if wanted, rounded per token at run time."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.projections import Float8Spec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.assemble import Part, fit_parts
from ffsplit.methods.budgets import one_branch_spec
from ffsplit.methods.compressors import NEAREST
from ffsplit.methods.registry import MethodConfig, method


class FP8Config(MethodConfig):
    """There is no budget: every weight takes 8 bits, and every row a scale.

    Attributes:
        activations: inputs of every projection become float8 too, per token.
        refit: least-squares fit of `down` on the activations as they become, before it is rounded itself; needs text.
        ridge: pull of that fit to the old weights.
    """

    method: Literal["fp8"] = "fp8"
    activations: bool = False
    refit: bool = False
    ridge: float = Field(1e-2, ge=0)

    @property
    def needs_data(self) -> bool:
        return self.refit


def structure(shape: FFNShape, config: FP8Config) -> SumSpec:
    """One float8 branch of all neurons."""
    return one_branch_spec(shape, lambda size: Float8Spec(shape=size, activations=config.activations))


@method(
    "fp8",
    summary="float8 (e4m3) weights with a scale a row, activations too if wanted",
    paper="FP8 Formats for Deep Learning, arXiv 2209.05433",
    budget=(),
    as_sum="one float8 branch of all neurons",
    config=FP8Config,
    structure=structure,
)
def fp8(data: LayerData, config: FP8Config) -> SumFFN:
    """Round every row to nearest."""
    spec = structure(FFNShape.of(data.ffn), config)
    neurons = torch.arange(data.ffn.d_ff, device=data.ffn.up.device)
    return fit_parts(data, [Part(neurons, spec.branches[0], NEAREST)], spec, refit=config.refit, ridge=config.ridge)
