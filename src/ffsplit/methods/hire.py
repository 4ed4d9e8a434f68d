"""HiRE: a cheap estimate proposes neurons with high recall, the largest of them work (arXiv 2402.09360)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.selectors import Selector, SelectorSpec, TopK, TopKSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods.registry import method
from ffsplit.methods.sparsity import ROUNDING, HeavyConfig, fit_masked, left_over, masked_structure
from ffsplit.ops.lowrank import whitened_factors
from ffsplit.ops.scores import column_norm


class HireConfig(HeavyConfig):
    """How many neurons work for a token, and how they are found.

    Attributes:
        sparsity: share of the neurons that stay out for every token (rounded up to whole neurons). It is saved of
            `down`; of `up` and `gate` the share without a candidate is saved, and the estimate costs on top.
        candidates: neurons that the estimate proposes for one that works; `up` and `gate` are computed for them.
        estimate: rank of the estimate, as a share of the model's width.
    """

    method: Literal["hire"] = "hire"
    candidates: float = Field(1.5, ge=1)
    estimate: float = Field(0.125, gt=0, le=1)


def structure(shape: FFNShape, config: HireConfig) -> SumSpec:
    """The largest neurons among the candidates, beside the heavy ones if there are any.

    Raises:
        BudgetError: not one neuron would work.
    """

    def top_k(neurons: int, share: float) -> TopKSpec:
        active = left_over(neurons, share, "neurons")
        rows = neurons * (2 if shape.gated else 1)
        return TopKSpec(
            neurons=neurons,
            d_model=shape.d_model,
            gated=shape.gated,
            biased=shape.up_bias or shape.gate_bias,
            rank=min(max(round(config.estimate * shape.d_model), 1), rows),
            candidates=min(math.ceil(config.candidates * active - ROUNDING), neurons),
            active=active,
        )

    return masked_structure(shape, config.sparsity, config.heavy, top_k)


@method(
    "hire",
    summary="a low-rank estimate proposes neurons for every token, the largest of them work",
    paper="HiRE, arXiv 2402.09360",
    budget=("sparsity",),
    as_sum="(heavy: dense, always) + rest: dense, the top neurons of each token",
    config=HireConfig,
    structure=structure,
    status="experimental",
)
def hire(data: LayerData, config: HireConfig) -> SumFFN:
    """The estimate is the best of its rank on the calibration inputs, `up` and `gate` jointly."""

    def calibrate(rest: FFNWeights, spec: SelectorSpec) -> Selector:
        assert isinstance(spec, TopKSpec)
        rows = rest.up if rest.gate is None else torch.cat([rest.up, rest.gate])
        a, b = whitened_factors(rows, data.moments.input_gram, spec.rank)
        bias = None
        if spec.biased:
            biases = (rest.up_bias, rest.gate_bias) if rest.gated else (rest.up_bias,)
            bias = torch.cat([rest.up.new_zeros(rest.d_ff) if part is None else part for part in biases])
        return TopK(spec, a.to(rest.up), b.to(rest.up), column_norm(rest.down).to(rest.up), bias)

    return fit_masked(data, config, structure(FFNShape.of(data.ffn), config), calibrate)
