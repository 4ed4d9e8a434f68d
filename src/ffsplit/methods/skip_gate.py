"""Whole FFNs skipped by the tokens that need them least, as a linear gate on the input predicts it."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.skips import Skip, SkipSpec, scores
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN, dense_branch
from ffsplit.methods.budgets import dense_branch_spec, sum_spec
from ffsplit.methods.registry import SparsityConfig, method
from ffsplit.ops.least_squares import affine_fit
from ffsplit.ops.skip_gate import Target, share_threshold, skip_cost


class SkipGateConfig(SparsityConfig):
    """What the gate predicts and what a skipped token gets.

    Attributes:
        sparsity: share of the tokens of the calibration text that skip the FFN, at least 0 and below 1.
        target: the gate is a regression on the ``norm`` (its logarithm, relative to the input) or on the ``energy`` of
            what a skipped token would miss.
        instead: a skipped token gets the ``mean`` output of the skipped tokens, or ``zero``.
        ridge: of the regression, relative to the mean variance of the inputs.
    """

    method: Literal["skip-gate"] = "skip-gate"
    target: Target = "norm"
    instead: Literal["mean", "zero"] = "mean"
    ridge: float = Field(1e-2, ge=0)


def structure(shape: FFNShape, config: SkipGateConfig) -> SumSpec:
    """The dense FFN under a gate."""
    spec = sum_spec(shape, [dense_branch_spec(shape, shape.d_ff)], bias=shape.down_bias)
    skip = SkipSpec(d_model=shape.d_model, sparsity=config.sparsity, constant=config.instead == "mean")
    return spec.model_copy(update={"skip": skip})


@method(
    "skip-gate",
    summary="a linear gate on the input lets the tokens that need an FFN least skip it",
    paper="Switchable Decision, arXiv 2405.04513, with a gate fitted in closed form instead of trained (ours)",
    budget=("sparsity",),
    as_sum="one dense branch of all neurons, skipped by some tokens",
    config=SkipGateConfig,
    structure=structure,
    status="experimental",
)
def skip_gate(data: LayerData, config: SkipGateConfig) -> SumFFN:
    """Regress the cost of a skip on the input, put the threshold at the asked share of the tokens."""
    ffn = data.ffn
    spec = structure(FFNShape.of(ffn), config)
    assert spec.skip is not None
    direction = data.as_stored(gate_direction(data, config))
    found = torch.cat([scores(x, direction) for x in data.chunks()])
    threshold = data.as_stored(torch.tensor([share_threshold(found, config.sparsity)]))
    constant = _mean_skipped(data, direction, threshold) if spec.skip.constant else None
    skip = Skip(spec.skip, direction, threshold, constant)
    return SumFFN(ffn.d_model, [dense_branch(ffn)], bias=ffn.down_bias, skip=skip)


def _mean_output(data: LayerData) -> Float[Tensor, " d_model"]:
    ffn, moments = data.ffn, data.moments
    mean = ffn.down.double() @ (moments.hidden_sum / moments.tokens)
    return (mean if ffn.down_bias is None else mean + ffn.down_bias).to(ffn.up)


def gate_direction(data: LayerData, config: SkipGateConfig) -> Float[Tensor, " d_model"]:
    """The direction of the input along which the cost of a skip grows, of length one; float64."""
    ffn, moments = data.ffn, data.moments
    base = _mean_output(data) if config.instead == "mean" else ffn.down.new_zeros(ffn.d_model)
    cross = moments.input_gram.new_zeros(ffn.d_model, 1)
    total = moments.input_gram.new_zeros(1)
    for x in data.chunks():
        cost = skip_cost(x, ffn(x) - base, config.target)
        cross += x.double().T @ cost[:, None]
        total += cost.sum()
    weight, _ = affine_fit(
        moments.input_gram, cross, moments.input_sum, total, int(moments.tokens), config.ridge
    )  # fmt: skip
    length = weight.norm()
    return weight[0] / torch.where(length > 0, length, 1.0)


def _mean_skipped(
    data: LayerData, direction: Float[Tensor, " d_model"], threshold: Float[Tensor, " one"]
) -> Float[Tensor, " d_model"]:
    """The mean output of the tokens that skip: the constant that misses least. The mean of all where none skips."""
    total, count = data.moments.input_sum.new_zeros(data.ffn.d_model), 0
    for x in data.chunks():
        skipped = x[scores(x, direction) <= threshold]
        total += data.ffn(skipped).double().sum(0)
        count += len(skipped)
    return (total / count).to(data.ffn.up) if count else _mean_output(data)
