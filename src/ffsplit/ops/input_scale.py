"""Scaling input columns before they are rounded, so that those with large inputs get finer steps (AWQ).

``x W^T = (x m) (W / m)^T`` for any positive ``m`` per input column. Rounding ``W / m`` instead of ``W`` spends the
levels of a group on the columns whose inputs are large.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float16
from torch import Tensor

from ffsplit.ops.refine import output_error
from ffsplit.ops.rounding import decode, round_to_nearest

STEPS = 20
LARGEST = 2.0**8  # beyond it float16 weights would leave the range in which they are exact


def search_input_scale(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    bits: int,
    group: int | None,
    *,
    symmetric: bool = False,
    scale_bits: int = 16,
    powers_of_two: bool = False,
    steps: int = STEPS,
) -> Float16[Tensor, " in"]:
    """The multiplier of the inputs, among ``steps + 1``, after which rounding costs the outputs least.

    The candidates are ``1 / rms^alpha`` with alpha from 0 (no scaling at all) to 1 in equal steps. For each, the scaled
    weight is rounded to nearest on grids whose ranges are searched too.

    Args:
        weight: the weight to be rounded.
        gram: ``sum x^T x`` of the inputs.
        bits: 1 to 8.
        group: see `fit_grid`.
        symmetric: see `fit_grid`.
        scale_bits: see `fit_grid`.
        powers_of_two: only multipliers that change no significant bit of any float, for folding into other weights.
        steps: how finely alpha is searched.

    Returns:
        Multipliers between 2^-8 and 2^8; one for inputs that are always zero.

    Reference: AWQ, arXiv 2306.00978, eq. 4 and 5. There the mean of ``|x|`` measures a channel; here it is the root
    mean square, which is in the Gram, and the multipliers have a geometric mean of one.
    """
    best = torch.ones(weight.shape[1], dtype=torch.float16, device=weight.device)
    least = float("inf")
    for step in range(steps + 1):
        multiplier = _multiplier(gram, step / steps, powers_of_two)
        scaled, scaled_gram = scale_inputs(weight, gram, multiplier)
        codes, grid = round_to_nearest(
            scaled,
            bits,
            group,
            symmetric=symmetric,
            search=True,
            importance=scaled_gram.diagonal().clamp_min(0.0) + 1e-12,
            scale_bits=scale_bits,
        )
        error = float(output_error(scaled, decode(codes, grid, torch.float32), scaled_gram))
        if error < least:
            best, least = multiplier, error
    return best


def scale_inputs(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], multiplier: Float16[Tensor, " in"]
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "in in"]]:
    """``W / m`` and the Gram of ``x m``: what is left to round once the inputs are multiplied."""
    wide = multiplier.to(gram)
    return weight / multiplier.to(weight), gram * wide * wide[:, None]


def _multiplier(gram: Float[Tensor, "in in"], alpha: float, powers_of_two: bool) -> Float16[Tensor, " in"]:
    energy = gram.diagonal().double()
    live = energy > 0
    logarithm = torch.where(live, energy, 1.0).log2() / 2
    centred = torch.where(live, logarithm - logarithm[live].mean(), 0.0)
    exponent = -alpha * centred
    exponent = exponent.round() if powers_of_two else exponent
    return torch.exp2(exponent).clamp(1 / LARGEST, LARGEST).to(torch.float16)
