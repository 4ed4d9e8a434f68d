"""One threshold for the neurons of all layers, so that together they meet a budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ffsplit.errors import RecipeError


def standardised(scores: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Scores in standard deviations from their mean, float64; zeros where all are equal.

    Reference: FLAP, arXiv 2312.11983, the standardisation that makes the scores of different layers comparable.
    """
    wide = scores.double()
    spread = wide.std(correction=0) if len(wide) else wide.new_zeros(())
    return (wide - wide.mean()) / spread if bool(spread > 0) else torch.zeros_like(wide)


def global_widths(
    scores: Sequence[Float[Tensor, "..."]], costs: Sequence[int], budget: int, align: int = 1
) -> list[int]:
    """How many neurons of each layer lie above one threshold, the lowest that the budget allows.

    Every layer keeps its ``align`` best neurons whatever the threshold. Beyond those, neurons come in groups of
    ``align``, valued by their mean score, so that each width is a multiple of it (or the whole layer).

    Args:
        scores: one tensor a layer, comparable between layers; larger = more important.
        costs: parameters that one neuron of each layer takes.
        budget: parameters for all neurons of all layers.
        align: what widths are a multiple of.

    Raises:
        RecipeError: the budget does not even pay for the least of every layer.

    Reference: FLAP, arXiv 2312.11983, the adaptive search for one global structure.
    """
    values, sizes, prices, layers = [], [], [], []
    for layer, (score, cost) in enumerate(zip(scores, costs, strict=True)):
        groups = torch.split(score.double().cpu().sort(descending=True).values, align)
        values += [float("inf"), *(float(group.mean()) for group in groups[1:])]
        sizes += [len(group) for group in groups]
        prices += [len(group) * cost for group in groups]
        layers += [layer] * len(groups)
    order = torch.argsort(torch.tensor(values, dtype=torch.float64), descending=True, stable=True).tolist()
    widths, left = [0] * len(scores), budget
    for place in order:
        left -= prices[place]
        if left < 0 and values[place] == float("inf"):
            raise RecipeError(f"a budget of {budget} parameters does not pay for {align} neurons of every layer")
        if left < 0:
            break
        widths[layers[place]] += sizes[place]
    return widths
