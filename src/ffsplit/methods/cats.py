"""CATS: one threshold a layer on the gate's activations (arXiv 2404.08763)."""

from __future__ import annotations

from typing import Literal

import torch

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.selectors import Selector, SelectorSpec, Threshold, ThresholdSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods.registry import method
from ffsplit.methods.sparsity import HeavyConfig, fit_masked, masked_structure, quantile


class CatsConfig(HeavyConfig):
    """How much of the neurons' work is left out.

    Attributes:
        sparsity: share of the pairs of neuron and token whose neuron stays out: of all neurons and calibration tokens
            those with the smallest absolute activation (of the gate, or of `up` without one). `gate` (or `up`) is
            still computed whole, so of the FFN's products two thirds of this share are saved with a gate, half
            without.
    """

    method: Literal["cats"] = "cats"


def structure(shape: FFNShape, config: CatsConfig) -> SumSpec:
    """All neurons under one threshold, beside the heavy ones if there are any."""
    return masked_structure(
        shape,
        config.sparsity,
        config.heavy,
        lambda neurons, share: ThresholdSpec(neurons=neurons, shared=True, sparsity=share),
    )


@method(
    "cats",
    summary="leave out neurons with a small activation, one threshold a layer",
    paper="CATS, arXiv 2404.08763",
    budget=("sparsity",),
    as_sum="(heavy: dense, always) + rest: dense, under a threshold",
    config=CatsConfig,
    structure=structure,
)
def cats(data: LayerData, config: CatsConfig) -> SumFFN:
    """The threshold is a quantile of the absolute activations."""

    def calibrate(rest: FFNWeights, spec: SelectorSpec) -> Selector:
        assert isinstance(spec, ThresholdSpec)
        level = quantile(data, lambda x: rest.activations(x).abs(), spec.sparsity)
        return Threshold(spec, torch.full((1,), level).to(rest.up))

    return fit_masked(data, config, structure(FFNShape.of(data.ffn), config), calibrate)
