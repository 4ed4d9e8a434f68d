"""Polish codes and scales that already exist, e.g. those of GPTQ: descent on the output error itself.

The error is ``tr((W - Q) G (W - Q)^T)`` with ``G = sum x^T x`` of the inputs. Every step solves one unknown exactly
with all others fixed, so no step can raise the error. Pass a damped Gram (`linalg.ridged`) to keep the polish from
fitting the noise of few calibration tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ffsplit.ops.blocks import descend, ratio
from ffsplit.ops.linalg import diagonal_scale, ridged
from ffsplit.ops.rounding import Grid, nearest_scale


def output_error(
    weight: Float[Tensor, "out in"], quantised: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]
) -> Float[Tensor, ""]:
    """``||(W - Q) X||_F^2 = tr((W - Q) G (W - Q)^T)``, float64."""
    error = weight.double() - quantised.double()
    return (error @ gram.double() * error).sum().clamp_min(0.0)


def refine(
    weight: Float[Tensor, "out in"],
    codes: UInt8[Tensor, "out in"],
    grid: Grid,
    gram: Float[Tensor, "in in"],
    bits: int,
    sweeps: int = 3,
) -> tuple[UInt8[Tensor, "out in"], Grid]:
    """``sweeps`` rounds of `refine_scales` and `refine_codes`; the error never rises."""
    for _ in range(sweeps):
        grid = refine_scales(weight, codes, grid, gram)
        codes = refine_codes(weight, codes, grid, gram, bits)
    return codes, grid


def refine_codes(
    weight: Float[Tensor, "out in"],
    codes: UInt8[Tensor, "out in"],
    grid: Grid,
    gram: Float[Tensor, "in in"],
    bits: int,
    sweeps: int = 1,
    block: int = 64,
) -> UInt8[Tensor, "out in"]:
    """Cyclic coordinate descent over the columns on a fixed grid.

    With all other columns fixed, the error is a parabola in one column's value, and the best code is the one nearest
    to its minimum. Columns without input energy keep their codes.

    Args:
        weight: the weight to imitate.
        codes: where to start; not changed.
        grid: fixed.
        gram: second moment of the inputs.
        bits: width of the codes.
        sweeps: passes over all columns.
        block: columns between two updates of the gradient of the rest; changes the speed, not the result.
    """
    work, metric = _problem(weight, gram)
    scale, zero = (values.to(work).T.contiguous() for values in grid.columns(weight.shape[1]))
    current = codes.T.to(work).contiguous()
    for _ in range(sweeps):
        gradient = metric @ (work - (current - zero) * scale)
        for start in range(0, len(work), block):
            here = slice(start, start + block)
            moved = descend(current[here], gradient[here].clone(), metric[here, here], scale[here], zero[here], bits)
            gradient.addmm_(metric[:, here], moved, alpha=-1)
    return current.T.to(torch.uint8).contiguous()


def refine_scales(
    weight: Float[Tensor, "out in"],
    codes: UInt8[Tensor, "out in"],
    grid: Grid,
    gram: Float[Tensor, "in in"],
    sweeps: int = 2,
) -> Grid:
    """Least-squares scales for given codes, one group of columns after another, each one that the grid can store.

    With the other groups fixed, the error is a parabola in a row's scale, so of all storable scales (float16 numbers,
    or multiples of the row's unit, which stays) the one nearest to its minimum is the best, the old scale included.
    Groups whose codes say nothing keep their scale.

    Args:
        weight: the weight to imitate.
        codes: fixed.
        grid: where to start; not changed.
        gram: second moment of the inputs.
        sweeps: passes over all groups.
    """
    work, metric = _problem(weight, gram)
    steps = codes.T.to(work) - grid.columns(weight.shape[1])[1].to(work).T
    scale = grid.scale.T.to(work)
    for _ in range(sweeps):
        gradient = metric @ (work - steps * scale.repeat_interleave(grid.group, dim=0)[: len(work)])
        for index in range(scale.shape[0]):
            here = slice(index * grid.group, (index + 1) * grid.group)
            curvature = (steps[here] * (metric[here, here] @ steps[here])).sum(0)
            shift = ratio((steps[here] * gradient[here]).sum(0), curvature)
            best = nearest_scale((scale[index] + shift)[:, None], grid.row_scale)[:, 0].to(work)
            best = torch.where(curvature > 0, best, scale[index])
            gradient.addmm_(metric[:, here], steps[here] * (best - scale[index]), alpha=-1)
            scale[index] = best
    return replace(grid, scale=scale.T.to(grid.scale.dtype).contiguous())


def _problem(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]
) -> tuple[Float[Tensor, "in out"], Float[Tensor, "in in"]]:
    """The transposed weight and the Gram in units of its mean diagonal, float32 (float64 if the weight is)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.T.to(dtype).contiguous(), (ridged(gram, 0.0) / diagonal_scale(gram)).to(dtype)
