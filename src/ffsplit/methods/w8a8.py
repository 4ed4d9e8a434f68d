"""Int8 for weights and activations, the latter rounded per token at run time."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.projections import Int8DynamicSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.assemble import Part, fit_parts
from ffsplit.methods.budgets import one_branch_spec
from ffsplit.methods.compressors import NEAREST
from ffsplit.methods.registry import MethodConfig, method


class W8A8Config(MethodConfig):
    """There is no budget: every weight takes 8 bits, and every row a scale.

    Attributes:
        refit: least-squares fit of `down` on the rounded activations before it is rounded itself; needs text.
        ridge: pull of that fit to the old weights.
    """

    method: Literal["w8a8"] = "w8a8"
    refit: bool = False
    ridge: float = Field(1e-2, ge=0)

    @property
    def needs_data(self) -> bool:
        return self.refit


def structure(shape: FFNShape, config: W8A8Config) -> SumSpec:
    """One int8 branch of all neurons."""
    return one_branch_spec(shape, lambda size: Int8DynamicSpec(shape=size))


@method(
    "w8a8",
    summary="int8 weights with a scale a row, activations rounded to int8 per token at run time",
    paper="ZeroQuant, arXiv 2206.01861 (token-wise activations); LLM.int8(), arXiv 2208.07339 (a scale a row)",
    budget=(),
    as_sum="one int8 branch of all neurons that rounds its inputs",
    config=W8A8Config,
    structure=structure,
)
def w8a8(data: LayerData, config: W8A8Config) -> SumFFN:
    """Round every row to nearest."""
    spec = structure(FFNShape.of(data.ffn), config)
    neurons = torch.arange(data.ffn.d_ff, device=data.ffn.up.device)
    return fit_parts(data, [Part(neurons, spec.branches[0], NEAREST)], spec, refit=config.refit, ridge=config.ridge)
