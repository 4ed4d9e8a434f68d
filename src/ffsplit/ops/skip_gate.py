"""Whole FFNs skipped token by token: what a gate should predict, and where its threshold lies."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Target = Literal["norm", "energy"]
# Relative outputs below this count as this small: the logarithm of nothing must not rule a regression.
FLOOR = 1e-8


def skip_cost(
    x: Float[Tensor, "tokens d_model"], missed: Float[Tensor, "tokens d_model"], target: Target
) -> Float[Tensor, " tokens"]:
    """What a token loses when the FFN is skipped, as a gate is to predict it; float64.

    Args:
        x: inputs of the FFN.
        missed: its outputs less what a skipped token gets instead.
        target: ``energy`` for ``|missed|^2``, ``norm`` for ``log(|missed| / |x|)``.
    """
    energy = missed.double().square().sum(-1)
    if target == "energy":
        return energy
    size = x.double().square().sum(-1)
    relative = energy / torch.where(size > 0, size, 1.0)
    return 0.5 * relative.clamp_min(FLOOR).log()


def share_threshold(scores: Float[Tensor, " tokens"], share: float) -> float:
    """A threshold that at most ``share`` of the scores lie at or below, as many of them as there are without ties.

    It lies halfway between two scores where there is room, so that rounding moves no score across it.

    Args:
        scores: of the calibration tokens, at least one.
        share: at least 0 and below 1.
    """
    ordered = scores.double().sort().values
    first_above = float(ordered[min(round(share * len(ordered)), len(ordered) - 1)])
    below = ordered[ordered < first_above]
    if not len(below):
        return first_above - max(abs(first_above), 1.0)
    last = float(below[-1])
    middle = float(torch.tensor((last + first_above) / 2, dtype=torch.float32))
    return middle if last <= middle < first_above else last
