"""Width pruning: keep the best neurons, drop the rest, let `down` or a bias make up for them."""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import BudgetError
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.assemble import AffineStart, Part, fit_parts
from ffsplit.methods.budgets import dense_branch_spec, keep_budget, sum_spec, width_for
from ffsplit.methods.neurons import DATA_FREE_SCORES, ScoreName, neuron_order
from ffsplit.methods.registry import MethodConfig, check_keep, method
from ffsplit.ops.compensate import pruned_mean

Compensate = Literal["none", "mean"]


class PruneConfig(MethodConfig):
    """Which neurons stay and what happens to their outputs. Exactly one of ``keep`` and ``width`` must be given.

    Attributes:
        keep: share of the FFN's parameters that stay, above 0 and at most 1.
        width: neurons that stay.
        score: the importance of a neuron.
        refit: fit `down` of the kept neurons to the dense outputs by least squares (MoDeGPT, STAT).
        compensate: `mean` adds an output bias that stands for the mean output of the pruned neurons (FLAP); with
            `refit` the bias is fitted together with `down`.
        ridge: pull of the refit to the old weights, relative to the mean diagonal of the hidden Gram.
        align: with `keep`, the kept width is a multiple of this (GPUs like 64 or 128, CPUs 16).
    """

    instead_of_budget: ClassVar[tuple[str, ...]] = ("width",)

    method: Literal["prune"] = "prune"
    keep: float | None = None
    width: int | None = Field(None, ge=1)
    score: ScoreName = "greedy_obs"
    refit: bool = True
    compensate: Compensate = "none"
    ridge: float = Field(1e-3, ge=0)
    align: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _one_budget(self) -> PruneConfig:
        if (self.keep is None) == (self.width is None):
            raise ValueError("give exactly one of keep (share of FFN parameters that stay) and width (neurons)")
        if self.keep is not None:
            check_keep(self.keep)
        elif self.align != 1:
            raise ValueError(f"align={self.align} goes with keep; width={self.width} is taken as it is")
        return self

    @property
    def needs_data(self) -> bool:
        return self.refit or self.compensate == "mean" or self.score not in DATA_FREE_SCORES

    @property
    def full_budget(self) -> bool:
        return self.keep == 1


def structure(shape: FFNShape, config: PruneConfig) -> SumSpec:
    """One dense branch of the kept neurons.

    Raises:
        BudgetError: no neuron fits, or more are asked for than there are.
    """
    compensated = config.compensate == "mean"
    if config.keep is not None:
        width = width_for(shape, keep_budget(shape, config.keep), config.align, bias=compensated)
    else:
        assert config.width is not None
        width = config.width
        if width > shape.d_ff:
            raise BudgetError(f"width={width} is more than the FFN's d_ff={shape.d_ff} neurons")
    return sum_spec(shape, [dense_branch_spec(shape, width)], bias=shape.down_bias or compensated)


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
    order = neuron_order(data, config.score, spec.neurons)
    part = Part(order[: spec.neurons], spec.branches[0])
    shift = None
    if config.compensate == "mean" and not config.refit:
        shift = compensation(data, order[spec.neurons :])
    return fit_parts(data, [part], spec, refit=config.refit, ridge=config.ridge, start=AffineStart(shift))


def compensation(data: LayerData, pruned: Int[Tensor, " pruned"]) -> Float[Tensor, " d_model"]:
    """The mean output of the pruned neurons on the calibration text."""
    statistics = data.moments
    return pruned_mean(statistics.hidden_sum / statistics.tokens, data.ffn.down, pruned)
