"""Low rank with a rank for every FFN from what the truncation of its matrices loses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from ffsplit.budget.registry import Decision, PlannerConfig, planner
from ffsplit.budget.scene import Scene
from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import BudgetError
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.registry import MethodConfig, check_keep, method_config
from ffsplit.methods.svd import SVDConfig
from ffsplit.ops.ranks import allocate_ranks, truncation_spectrum

logger = logging.getLogger(__name__)


class RanksConfig(PlannerConfig):
    """How FFNs compete for ranks, and how their matrices are factored.

    Attributes:
        keep: share of the parameters of all FFNs together that stay, above 0 and at most 1.
        factors: ``whitened`` for `whitened-svd`, the ranks from the error on text; ``plain`` for `svd`, the ranks from
            the error of the weights.
        floor: no rank is below this share of the one that all FFNs could have together, 0 to 1; 1 gives all the same.
        refit: fit `down` on the hidden activations of the low-rank inner projections, as in `whitened-svd`.
        ridge: of that fit.
    """

    method: Literal["ranks"] = "ranks"
    keep: float
    factors: Literal["whitened", "plain"] = "whitened"
    floor: float = Field(0.5, ge=0, le=1)
    refit: bool = True
    ridge: float = Field(1e-3, ge=0)

    @model_validator(mode="after")
    def _keep_in_range(self) -> RanksConfig:
        check_keep(self.keep)
        return self

    @property
    def needs_data(self) -> bool:
        return self.factors == "whitened" and not self.full_budget

    @property
    def full_budget(self) -> bool:
        return self.keep == 1


def rank_costs(shapes: Sequence[FFNShape]) -> list[int]:
    """Parameters of one rank more in all matrices of each FFN."""
    return [shape.matrices * (shape.d_ff + shape.d_model) for shape in shapes]


def rank_budget(shapes: Sequence[FFNShape], config: RanksConfig) -> int:
    """Parameters that are left for ranks beside the biases once every matrix has rank 1."""
    biases = sum(shape.parameters - shape.weights for shape in shapes)
    return int(config.keep * sum(shape.parameters for shape in shapes)) - biases - sum(rank_costs(shapes))


def check(shapes: Sequence[FFNShape], config: RanksConfig) -> None:
    """Refuse a budget that does not leave every matrix rank 1.

    Raises:
        BudgetError: says the smallest reachable.
    """
    left = rank_budget(shapes, config)
    if left < 0:
        total = sum(shape.parameters for shape in shapes)
        smallest = (int(config.keep * total) - left) / total
        raise BudgetError(f"keep={config.keep} leaves no rank 1 for all; the smallest reachable keep is {smallest:.4f}")


@planner(
    "ranks",
    summary="low rank with a rank for every FFN by what truncation loses, under one budget",
    paper="SVD-LLM v2, arXiv 2503.12340 (the idea: ranks by theoretical loss)",
    budget=("keep",),
    as_sum="one low-rank branch of all neurons, of a rank of its own in every FFN",
    config=RanksConfig,
    check=check,
    status="experimental",
)
def ranks(scene: Scene, config: RanksConfig) -> Decision:
    """Spectra of the dense model's (whitened) matrices, then the rank that saves the most for each parameter first."""
    shapes = scene.shapes
    if config.full_budget:
        return [_method(1.0, config) for _ in shapes]
    found = {index: _spectrum(data, shapes[index], config) for index, data in scene.layers()}
    # Every matrix has rank 1, whatever its spectrum says.
    spectra = [found[index][1:] for index in range(len(shapes))]
    bought = allocate_ranks(spectra, rank_costs(shapes), rank_budget(shapes, config), config.floor)
    chosen = [1 + rank for rank in bought]
    logger.info("ranks %s", chosen)
    return [_method(_keep(shape, rank), config) for shape, rank in zip(shapes, chosen, strict=True)]


def _spectrum(data: LayerData, shape: FFNShape, config: RanksConfig) -> Float[Tensor, " rank"]:
    """What each rank of an FFN saves, up to the one at which factors are as large as the matrices.

    The loss of a matrix counts relative to what it gives in all, so that those of different units can be added up.
    """
    ffn, inner, outer = data.ffn, None, None
    if config.factors == "whitened":
        inner, outer = data.statistics.input_gram, data.statistics.hidden_gram
    gate = [] if ffn.gate is None else [(ffn.gate, inner)]
    total = torch.zeros(shape.d_ff * shape.d_model // (shape.d_ff + shape.d_model), dtype=torch.float64)
    for weight, gram in [(ffn.up, inner), *gate, (ffn.down, outer)]:
        spectrum = truncation_spectrum(weight, gram).clamp_min(0.0).cpu()
        total += spectrum[: len(total)] / spectrum.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return total


def _keep(shape: FFNShape, rank: int) -> float:
    """The share of parameters at which all matrices of an FFN get this rank."""
    stored = shape.parameters - shape.weights + rank * rank_costs([shape])[0]
    # Half a parameter more: the share is rounded down to whole ones when it is spent.
    return min((stored + 0.5) / shape.parameters, 1.0)


def _method(keep: float, config: RanksConfig) -> MethodConfig:
    if config.factors == "plain":
        return SVDConfig(keep=keep)
    return method_config({"method": "whitened-svd", "keep": keep, "refit": config.refit, "ridge": config.ridge})
