"""FLAP: a width for every FFN from one threshold over the standardised scores of all neurons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from ffsplit.budget.registry import Decision, PlannerConfig, planner
from ffsplit.budget.scene import Scene
from ffsplit.budget.widths import pruned_to
from ffsplit.errors import BudgetError
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.neurons import DATA_FREE_SCORES, ORDERINGS, ScoreName, neuron_scores
from ffsplit.methods.prune import Compensate
from ffsplit.methods.registry import check_keep
from ffsplit.ops.threshold import global_widths, standardised


class FlapConfig(PlannerConfig):
    """How neurons of different layers compete, and what each FFN then becomes.

    Attributes:
        keep: share of the parameters of all FFNs together that stay, above 0 and at most 1.
        score: the importance of a neuron; `flap_variance` is the paper's WIFV. Orderings (`pivoted_qr`, `greedy_obs`,
            `forward`) give no number and cannot be compared between layers.
        compensate: `mean` adds an output bias that stands for the mean output of the pruned neurons.
        refit: fit `down` of the kept neurons to the dense outputs by least squares. The paper has none.
        ridge: pull of the refit to the old weights, relative to the mean diagonal of the hidden Gram.
        align: every kept width is a multiple of this (hardware likes 64 or 128).
    """

    method: Literal["flap"] = "flap"
    keep: float
    score: ScoreName = "flap_variance"
    compensate: Compensate = "mean"
    refit: bool = False
    ridge: float = Field(1e-3, ge=0)
    align: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _comparable(self) -> FlapConfig:
        check_keep(self.keep)
        if self.score in ORDERINGS:
            raise ValueError(f"score={self.score!r} orders the neurons of one FFN and gives no number to compare")
        return self

    @property
    def needs_data(self) -> bool:
        return self.refit or self.compensate == "mean" or self.score not in DATA_FREE_SCORES

    @property
    def full_budget(self) -> bool:
        return self.keep == 1


def neuron_budget(shapes: Sequence[FFNShape], config: FlapConfig) -> int:
    """Parameters that are left for neurons once every output bias is paid for."""
    biases = sum(shape.d_model * (shape.down_bias or config.compensate == "mean") for shape in shapes)
    return int(config.keep * sum(shape.parameters for shape in shapes)) - biases


def check(shapes: Sequence[FFNShape], config: FlapConfig) -> None:
    """Refuse a budget that does not leave every FFN its least.

    Raises:
        BudgetError: says the smallest reachable.
    """
    least = sum(min(config.align, shape.d_ff) * shape.neuron_parameters for shape in shapes)
    budget = neuron_budget(shapes, config)
    if least > budget and not config.full_budget:
        total = sum(shape.parameters for shape in shapes)
        smallest = (least - budget + int(config.keep * total)) / total
        raise BudgetError(
            f"keep={config.keep} does not leave {config.align} neurons of every FFN (align={config.align}); the "
            f"smallest reachable keep is {smallest:.4f}"
        )


@planner(
    "flap",
    summary="a width for every FFN from one threshold over standardised neuron scores, then bias compensation",
    paper="FLAP, arXiv 2312.11983",
    budget=("keep",),
    as_sum="one dense branch of the kept neurons, of a width of its own in every FFN, + bias",
    config=FlapConfig,
    check=check,
)
def flap(scene: Scene, config: FlapConfig) -> Decision:
    """Score every neuron in the dense model, standardise per layer, cut once."""
    settings = config.model_dump(include={"score", "compensate", "refit", "ridge"})
    if config.full_budget:
        return [pruned_to(shape.d_ff, shape, **settings) for shape in scene.shapes]
    scored = {index: standardised(neuron_scores(data, config.score)) for index, data in scene.layers()}
    costs = [shape.neuron_parameters for shape in scene.shapes]
    scores = [scored[index] for index in range(len(costs))]
    widths = global_widths(scores, costs, neuron_budget(scene.shapes, config), config.align)
    return [pruned_to(width, shape, **settings) for width, shape in zip(widths, scene.shapes, strict=True)]
