"""Hot neurons always work, cold ones where a predictor expects it: the idea of PowerInfer (arXiv 2312.12456)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.selectors import Predictor, PredictorSpec, Selector, SelectorSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods.registry import method
from ffsplit.methods.sparsity import RefitConfig, fit_masked, masked_structure, quantile
from ffsplit.ops.least_squares import centred, reduced_rank_regression
from ffsplit.ops.scores import column_norm


class HotColdConfig(RefitConfig):
    """How many neurons are hot, and how the cold ones that work are found.

    Attributes:
        sparsity: share of the pairs of neuron and token, over all neurons and calibration tokens, whose neuron the
            predictor leaves out. It is saved of all the FFN's products, less those of the predictor.
        hot: share of the neurons, those active most often (their output norm is above the token's mean), that work
            for every token.
        predictor: rank of the predictor, as a share of the model's width.
        predictor_ridge: pull of the predictor to zero, relative to the mean diagonal of the inputs' Gram.
    """

    method: Literal["hot-cold"] = "hot-cold"
    hot: float = Field(0.2, ge=0, lt=1)
    predictor: float = Field(0.125, gt=0, le=1)
    predictor_ridge: float = Field(1e-3, ge=0)


def structure(shape: FFNShape, config: HotColdConfig) -> SumSpec:
    """The hot neurons, and the cold ones under a predictor."""

    def predictor(neurons: int, share: float) -> PredictorSpec:
        rank = min(max(round(config.predictor * shape.d_model), 1), neurons)
        return PredictorSpec(neurons=neurons, d_model=shape.d_model, rank=rank, sparsity=share)

    return masked_structure(shape, config.sparsity, config.hot, predictor)


@method(
    "hot-cold",
    summary="neurons that are often active always work, the others when a low-rank predictor says so",
    paper="PowerInfer, arXiv 2312.12456 (the split and the predictor, not the placement on devices)",
    budget=("sparsity",),
    as_sum="hot: dense, always + cold: dense, under a predictor",
    config=HotColdConfig,
    structure=structure,
    status="experimental",
)
def hot_cold(data: LayerData, config: HotColdConfig) -> SumFFN:
    """Hot by frequency, a predictor of the others' activity in closed form."""

    def calibrate(cold: FFNWeights, spec: SelectorSpec) -> Selector:
        assert isinstance(spec, PredictorSpec)
        return fit_predictor(data, cold, spec, config.predictor_ridge)

    spec = structure(FFNShape.of(data.ffn), config)
    return fit_masked(data, config, spec, calibrate, score=data.moments.hidden_active)


def fit_predictor(data: LayerData, ffn: FFNWeights, spec: PredictorSpec, ridge: float) -> Predictor:
    """Least squares of low rank from the inputs to whether a neuron is active, then a level that meets the share.

    Active are the pairs of neuron and token with the largest output ``|h_j| ||down_j||``, as many as are to work.
    """
    lengths = column_norm(ffn.down)

    def outputs(x: Float[Tensor, "tokens d_model"]) -> Tensor:
        return ffn.hidden(x).abs() * lengths

    level = quantile(data, outputs, spec.sparsity)
    cross = torch.zeros(spec.d_model, spec.neurons, dtype=torch.float64, device=ffn.up.device)
    total = cross.new_zeros(spec.neurons)
    for x in data.chunks():
        active = (outputs(x) > level).double()
        cross.addmm_(x.double().T, active)
        total += active.sum(0)
    sums, tokens = data.moments, data.inputs.tokens
    a, b = reduced_rank_regression(*centred(sums.input_gram, cross, sums.input_sum, total, tokens), spec.rank, ridge)
    bias = (total - a @ (b @ sums.input_sum)) / tokens
    fitted = Predictor(spec, a.to(ffn.up), b.to(ffn.up), bias.to(ffn.up))
    fitted.bias -= quantile(data, fitted.scores, spec.sparsity)
    return fitted
