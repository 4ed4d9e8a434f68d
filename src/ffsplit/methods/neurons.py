"""Which neurons come first: every score and ordering of the field behind one function."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import RecipeError
from ffsplit.ops import scores, selection

ScoreName = Literal[
    "output_norm",
    "activation_norm",
    "magnitude",
    "wanda_sp",
    "flap_variance",
    "minitron",
    "taylor",
    "taylor_elementwise",
    "mask_gradient",
    "leverage",
    "pivoted_qr",
    "greedy_obs",
    "forward",
    "random",
]
SCORES: tuple[str, ...] = get_args(ScoreName)
DATA_FREE_SCORES = frozenset({"magnitude", "random"})
GRADIENT_SCORES = frozenset({"taylor", "taylor_elementwise", "mask_gradient"})
"""Scores from a backward pass through the dense model, which the caller makes beforehand."""
ORDERINGS = frozenset({"pivoted_qr", "greedy_obs", "forward"})
"""Names that choose a set jointly: they give an order, not a number a neuron."""


def neuron_scores(data: LayerData, name: ScoreName, *, ridge: float = 1e-3) -> Tensor:
    """Importance of every neuron, larger is more important, for the scores that give each neuron a number.

    Raises:
        KeyError: ``name`` is an ordering (``pivoted_qr``, ``greedy_obs``, ``forward``), not a score.
    """
    ffn = data.ffn
    if name == "magnitude":
        return scores.magnitude(ffn.up, ffn.gate, ffn.down)
    if name == "random":
        generator = torch.Generator().manual_seed(data.seed)
        return scores.random_scores(ffn.d_ff, generator).to(ffn.up.device)
    if name in GRADIENT_SCORES:
        return _gradient_scores(data, name)
    if name == "leverage":
        return selection.leverage(data.statistics.hidden_gram, ridge)
    statistics = data.moments
    square_sum = statistics.hidden_square_sum
    computed = {
        "output_norm": lambda: scores.output_norm(square_sum, ffn.down),
        "activation_norm": lambda: scores.activation_norm(square_sum),
        "wanda_sp": lambda: scores.wanda_sp(square_sum, ffn.down),
        "flap_variance": lambda: scores.flap_variance(statistics.hidden_variance, ffn.down),
        "minitron": lambda: scores.minitron(statistics.sequence_mean_square),
    }
    return computed[name]()


def _gradient_scores(data: LayerData, name: str) -> Tensor:
    if data.gradients is None:
        raise RecipeError(f"{data.name}: score={name!r} needs gradients of the dense model, and none were taken")
    found = {
        "taylor": data.gradients.group.abs(),
        "taylor_elementwise": data.gradients.elementwise,
        "mask_gradient": data.gradients.mask,
    }
    return found[name].to(data.ffn.up.device)


def neuron_order(data: LayerData, name: ScoreName, count: int, *, ridge: float = 1e-3) -> Int[Tensor, " d_ff"]:
    """All neurons, the ``count`` chosen ones first (most important first), then the rest.

    Orderings that choose a set jointly (greedy OBS, pivoted QR, forward selection) choose it for this ``count``.
    """
    ffn = data.ffn
    if name == "greedy_obs":
        chosen = _greedy_obs(data, count)
    elif name == "forward":
        chosen = selection.forward_selection_order(data.statistics.hidden_gram, ffn.down, count)
    elif name == "pivoted_qr":
        chosen = selection.pivoted_qr_order(data.statistics.hidden_gram, count=count)
    else:
        return torch.argsort(neuron_scores(data, name, ridge=ridge), descending=True, stable=True)
    chosen = chosen[:count].to(ffn.up.device)
    left = torch.ones(ffn.d_ff, dtype=torch.bool, device=chosen.device)
    left[chosen] = False
    return torch.cat([chosen, left.nonzero().flatten()])


def nested_order(data: LayerData, name: ScoreName) -> Int[Tensor, " d_ff"]:
    """All neurons, most important first, so that every prefix is a selection by ``name``."""
    if name == "greedy_obs":
        return selection.obs_ranking(data.statistics.hidden_gram, data.ffn.down, 1).to(data.ffn.up.device)
    return neuron_order(data, name, data.ffn.d_ff)


def _greedy_obs(data: LayerData, count: int) -> Int[Tensor, " count"]:
    """The survivors of greedy elimination; one that went further than asked holds every larger set too."""
    kept, ranking = data.memo.get("greedy_obs", (None, None))
    if kept is None or kept > count:
        ranking = selection.obs_ranking(data.statistics.hidden_gram, data.ffn.down, count)
        data.memo["greedy_obs"] = (count, ranking)
    survivors: Tensor = ranking[:count]
    return survivors
