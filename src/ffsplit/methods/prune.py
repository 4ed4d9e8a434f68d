"""Width pruning: keep the best neurons, drop the rest, refit `down` by least squares."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.assemble import Part, fit_parts
from ffsplit.methods.budgets import dense_branch_spec, keep_budget, sum_spec, width_for
from ffsplit.methods.neurons import DATA_FREE_SCORES, ScoreName, neuron_order
from ffsplit.methods.registry import KeepConfig, method


class PruneConfig(KeepConfig):
    """Which neurons stay and what happens to their outputs.

    Attributes:
        score: the importance of a neuron.
        refit: fit `down` of the kept neurons to the dense outputs by least squares (MoDeGPT, STAT).
        ridge: pull of the refit to the old weights, relative to the mean diagonal of the hidden Gram.
        align: the kept width is a multiple of this (hardware likes 64 or 128).
    """

    method: Literal["prune"] = "prune"
    score: ScoreName = "greedy_obs"
    refit: bool = True
    ridge: float = Field(1e-3, ge=0)
    align: int = Field(1, ge=1)

    @property
    def needs_data(self) -> bool:
        return self.refit or self.score not in DATA_FREE_SCORES


def structure(shape: FFNShape, config: PruneConfig) -> SumSpec:
    """One dense branch of the kept neurons."""
    width = width_for(shape, keep_budget(shape, config.keep), config.align)
    return sum_spec(shape, [dense_branch_spec(shape, width)], bias=shape.down_bias)


@method(
    "prune",
    summary="drop the neurons with the lowest score, refit `down`",
    paper="MoDeGPT 2408.09632, STAT 2406.00061, FLAP 2312.11983, Minitron 2407.14679 (by `score`)",
    budget=("keep",),
    as_sum="one dense branch of the kept neurons",
    config=PruneConfig,
    structure=structure,
)
def prune(data: LayerData, config: PruneConfig) -> SumFFN:
    """Keep the neurons of highest score, most important first."""
    spec = structure(FFNShape.of(data.ffn), config)
    if config.refit and data.inputs.tokens:
        _ = data.statistics  # the refit needs them all: one pass over the inputs instead of two
    kept = neuron_order(data, config.score, spec.neurons)[: spec.neurons]
    part = Part(kept, spec.branches[0])
    return fit_parts(data, [part], spec, refit=config.refit, ridge=config.ridge)
