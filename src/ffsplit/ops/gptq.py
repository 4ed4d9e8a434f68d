"""GPTQ: round one column at a time and let the columns that are still free absorb the error.

The error that counts is that of the outputs, ``||(W - Q) X||_F^2 = tr((W - Q) G (W - Q)^T)`` with ``G = sum x^T x``.
The working matrix is kept transposed, one input column per contiguous row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ffsplit.ops.blocks import round_block
from ffsplit.ops.linalg import diagonal_scale, ridged, shifted_cholesky
from ffsplit.ops.rounding import Grid, fit_grid, group_size

Order = Literal["natural", "descending"]
Fit = partial[Grid]
Settle = Callable[[slice, Float[Tensor, "block out"], Float[Tensor, "block block"]], Float[Tensor, "block out"]]


def gptq(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    bits: int,
    group: int | None,
    *,
    symmetric: bool = False,
    damp: float = 0.01,
    order: Order = "descending",
    search: bool = True,
    block: int = 64,
    scale_bits: int = 16,
) -> tuple[UInt8[Tensor, "out in"], Grid]:
    """Codes whose outputs, not whose weights, are close to those of ``weight``.

    Args:
        weight: any float dtype; worked on in float32, or float64 if it is.
        gram: ``sum x^T x`` of the inputs; dead inputs and singular Grams are fine.
        bits: 1 to 8.
        group: columns per group in the original order, or None for one group per row.
        symmetric: see `fit_grid`.
        damp: ridge on the Gram, relative to its mean diagonal.
        order: ``descending`` rounds the columns with the most input energy first, while all others can still correct
            for them, on grids fitted to ``weight`` beforehand (the order jumps between groups). ``natural`` goes from
            left to right and fits each group's grid to the corrected weights when it gets there. Where the inputs'
            energies differ by orders of magnitude, as hidden activations do, descending order leaves up to 4 times
            less error; where they are alike, the two are within 20 % of each other.
        search: search each grid's range for the least squared error, weighted by the Gram's diagonal.
        block: columns between two updates of the rest of the matrix; changes the speed, not the result.
        scale_bits: see `fit_grid`; in natural order the units of 8-bit scales are those of the uncorrected weight.

    Returns:
        The codes in the original column order, and their grid.

    Reference: GPTQ, arXiv 2210.17323, algorithm 1; descending order is the "act-order" of its code.
    """
    work = weight.to(torch.promote_types(weight.dtype, torch.float32))
    metric = gram.double() / diagonal_scale(gram)
    size = group_size(weight.shape[1], group)
    fit = partial(fit_grid, bits=bits, group=size, symmetric=symmetric, search=search, scale_bits=scale_bits)
    return (_static if order == "descending" else _dynamic)(work, metric, bits, fit, damp, block)


def _static(
    work: Float[Tensor, "out in"], metric: Float[Tensor, "in in"], bits: int, fit: Fit, damp: float, block: int
) -> tuple[UInt8[Tensor, "out in"], Grid]:
    """Descending order, every grid fitted beforehand."""
    order = metric.diagonal().argsort(descending=True, stable=True)
    grid = fit(work, importance=_importance(metric).to(work))
    rest = work.T[order].contiguous()
    factor = inverse_factor(metric[order][:, order], damp).to(work).contiguous()
    scale, zero = (values.to(work).T[order].contiguous() for values in grid.columns(work.shape[1]))
    codes = torch.empty_like(rest, dtype=torch.uint8)
    codes[order] = _round_span(rest, factor, scale, zero, bits, 0, block)
    return codes.T.contiguous(), grid


def _dynamic(
    work: Float[Tensor, "out in"], metric: Float[Tensor, "in in"], bits: int, fit: Fit, damp: float, block: int
) -> tuple[UInt8[Tensor, "out in"], Grid]:
    """Natural order, every grid fitted to the corrected weights of its group."""
    rest = work.T.clone(memory_format=torch.contiguous_format)
    factor = inverse_factor(metric, damp).to(work).contiguous()
    size: int = fit.keywords["group"]
    row_scale = fit(work, search=False).row_scale if fit.keywords["scale_bits"] == 8 else None
    grids, codes = [], []
    for start in range(0, len(rest), size):
        group = rest[start : start + size].T
        importance = _importance(metric)[start : start + size].to(work)
        grids.append(fit(group, importance=importance, row_scale=row_scale))
        scale, zero = (values.to(work).T.contiguous() for values in grids[-1].columns(group.shape[1]))
        codes.append(_round_span(rest, factor, scale, zero, bits, start, block))
    grid = Grid(torch.cat([one.scale for one in grids], 1), torch.cat([one.zero for one in grids], 1), size, row_scale)
    return torch.cat(codes).T.contiguous(), grid


def _importance(metric: Float[Tensor, "in in"]) -> Float[Tensor, " in"]:
    """Input energies in units of their mean, never quite zero: a dead input still deserves a sensible grid."""
    return metric.diagonal().clamp_min(0.0) + 1e-6


def inverse_factor(gram: Float[Tensor, "n n"], damp: float) -> Float[Tensor, "n n"]:
    """Upper triangular ``U`` with ``U^T U = (gram + damp * mean(diag) * I)^-1``, float64.

    Factored from the last column to the first, so that no explicit inverse is formed. A Gram that stays singular is
    shifted until it is positive definite.
    """
    lower = shifted_cholesky(ridged(gram, damp).flip(0, 1))
    identity = torch.eye(len(gram), dtype=lower.dtype, device=lower.device)
    factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return factor


def settle_span(
    rest: Float[Tensor, "in out"],
    factor: Float[Tensor, "in in"],
    settle: Settle,
    start: int,
    stop: int,
    block: int,
) -> None:
    """Decide the columns from ``start`` to ``stop`` block after block; correct all later rows of ``rest`` in place.

    Args:
        rest: the weight, one input column per row.
        factor: see `inverse_factor`.
        settle: decides a block: given which columns it is, their values, all corrected so far, and the block's own part
            of the factor, it returns the scaled errors that the columns after the block are to be corrected for.
        start: first column to decide.
        stop: the one after the last.
        block: columns between two updates of everything after the block.
    """
    for first in range(start, stop, block):
        here = slice(first, min(first + block, stop))
        errors = settle(here, rest[here], factor[here, here])
        rest[here.stop :].addmm_(factor[here, here.stop :].T, errors, alpha=-1)


def _round_span(
    rest: Float[Tensor, "in out"],
    factor: Float[Tensor, "in in"],
    scale: Float[Tensor, "span out"],
    zero: Float[Tensor, "span out"],
    bits: int,
    start: int,
    block: int,
) -> UInt8[Tensor, "span out"]:
    """Round the columns from ``start`` on for which there is a scale; correct all later rows of ``rest`` in place."""
    codes = torch.empty(scale.shape, dtype=torch.uint8, device=rest.device)

    def settle(here: slice, values: Tensor, block_factor: Tensor) -> Tensor:
        part = slice(here.start - start, here.stop - start)
        return round_block(values, block_factor, scale[part], zero[part], bits, codes[part])

    settle_span(rest, factor, settle, start, start + len(scale), block)
    return codes
