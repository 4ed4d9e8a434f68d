"""Gated neurons without their activation: a product of two linear maps of the input."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import RecipeError
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.assemble import Part, fit_parts
from ffsplit.methods.budgets import dense_branch_spec, sum_spec
from ffsplit.methods.linearise import activation_moments
from ffsplit.methods.registry import MethodConfig, method
from ffsplit.ops.affine_activation import fit_affine_activation


class BilinearConfig(MethodConfig):
    """How many neurons lose their activation. There is no budget: nothing gets smaller.

    Attributes:
        light: share of the neurons that lose it, those that the loss changes least; 1 means all of them.
        refit: fit `down` to the dense outputs by least squares afterwards.
        ridge: pull of that fit to the old weights.
    """

    method: Literal["bilinear"] = "bilinear"
    light: float = Field(0.5, ge=0, le=1)
    refit: bool = True
    ridge: float = Field(1e-3, ge=0)

    @property
    def full_budget(self) -> bool:
        return self.light == 0


def structure(shape: FFNShape, config: BilinearConfig) -> SumSpec:
    """Heavy neurons as they are, light ones without activation but with a gate bias for the line's intercept.

    Raises:
        RecipeError: the FFN has no gate.
    """
    if not shape.gated:
        raise RecipeError(
            "method bilinear needs gated FFNs, and this one has no gate: without its activation a plain neuron is "
            "linear in the input; use method linearise, which makes one map of such neurons"
        )
    light = round(config.light * shape.d_ff)
    line = dense_branch_spec(shape, light).model_copy(update={"act": "none", "gate_bias": True})
    return sum_spec(shape, [dense_branch_spec(shape, shape.d_ff - light), line], bias=shape.down_bias)


@method(
    "bilinear",
    summary="the neurons that need it least lose their activation: gate times up, without any function between",
    paper="the bilinear layer of GLU Variants, arXiv 2002.05202, fitted without training (ours)",
    budget=(),
    as_sum="heavy: dense + light: dense without activation",
    config=BilinearConfig,
    structure=structure,
    status="experimental",
)
def bilinear(data: LayerData, config: BilinearConfig) -> SumFFN:
    """Put each light neuron's least-squares line in the place of its activation, then refit `down`."""
    spec = structure(FFNShape.of(data.ffn), config)
    fitted = fit_affine_activation(activation_moments(data))
    order = torch.argsort(fitted.loss(data.ffn.down), descending=True, stable=True)
    parts, start = [], 0
    for branch in spec.branches:
        neurons = order[start : start + branch.neurons]
        parts.append(Part(neurons, branch, line=fitted.take(neurons)))
        start += branch.neurons
    return fit_parts(data, parts, spec, refit=config.refit, ridge=config.ridge)
