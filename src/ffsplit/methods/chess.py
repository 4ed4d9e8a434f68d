"""CHESS: a threshold a neuron, by what leaving it out costs (arXiv 2409.01366)."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.selectors import Selector, SelectorSpec, Threshold, ThresholdSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods.registry import method
from ffsplit.methods.sparsity import HeavyConfig, fit_masked, masked_structure, mean_square_up, quantile
from ffsplit.ops.scores import column_norm
from ffsplit.ops.thresholds import neuron_thresholds


class ChessConfig(HeavyConfig):
    """How much of the neurons' work is left out, and what counts as small.

    Attributes:
        sparsity: share of the pairs of neuron and token whose neuron stays out: of all neurons and calibration tokens
            those whose output is expected to matter least, `act(gate)^2` times the mean square of `up`. `gate` (or
            `up` without one) is still computed whole, so of the FFN's products two thirds of this share are saved
            with a gate, half without.
        use_down: also weigh a neuron by the length of its column of `down` (ours); false is CHESS as published.
    """

    method: Literal["chess"] = "chess"
    use_down: bool = True


def structure(shape: FFNShape, config: ChessConfig) -> SumSpec:
    """All neurons, each under its threshold, beside the heavy ones if there are any."""
    return masked_structure(
        shape, config.sparsity, config.heavy, lambda neurons, share: ThresholdSpec(neurons=neurons, sparsity=share)
    )


@method(
    "chess",
    summary="leave out neurons whose expected output is small, one threshold a neuron",
    paper="CHESS, arXiv 2409.01366",
    budget=("sparsity",),
    as_sum="(heavy: dense, always) + rest: dense, under thresholds",
    config=ChessConfig,
    structure=structure,
)
def chess(data: LayerData, config: ChessConfig) -> SumFFN:
    """One quantile over all weighted activations, divided by each neuron's weight."""

    def calibrate(rest: FFNWeights, spec: SelectorSpec) -> Selector:
        assert isinstance(spec, ThresholdSpec)
        weight = neuron_weight(data, rest, use_down=config.use_down)
        level = quantile(data, lambda x: rest.activations(x).abs() * weight, spec.sparsity)
        return Threshold(spec, neuron_thresholds(level, weight).to(rest.up))

    return fit_masked(data, config, structure(FFNShape.of(data.ffn), config), calibrate)


def neuron_weight(data: LayerData, ffn: FFNWeights, *, use_down: bool) -> Float[Tensor, " neurons"]:
    """What an activation of one is expected to do to the output: ``sqrt(E[up_j^2])``, times ``||down_j||``."""
    weight = mean_square_up(data, ffn).sqrt()
    return weight * column_norm(ffn.down) if use_down else weight
