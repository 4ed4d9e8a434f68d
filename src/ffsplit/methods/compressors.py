"""Turning one matrix into a storage, given the Gram of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ffsplit.ffn.spec import DenseSpec, LowRankSpec, PackedSpec
from ffsplit.ffn.storage import Dense, LowRank, Packed, Projection
from ffsplit.ops.gptq import gptq
from ffsplit.ops.linalg import ridged
from ffsplit.ops.lowrank import svd_factors, whitened_factors
from ffsplit.ops.refine import refine
from ffsplit.ops.rounding import Grid, encode, fit_grid

LowRankHow = Literal["svd", "whitened"]
RoundHow = Literal["rtn", "gptq"]
How = Literal["svd", "whitened", "rtn", "gptq"]
# Ridge on the Gram of GPTQ and of the descent after it, so that neither fits the calibration text alone.
DAMP = 0.01
DATA_FREE = frozenset({"svd", "rtn"})


def compress(
    weight: Float[Tensor, "out in"],
    spec: DenseSpec | LowRankSpec | PackedSpec,
    how: How,
    gram: Float[Tensor, "in in"] | None,
    dtype: torch.dtype,
    polish: int = 0,
) -> Projection:
    """``weight`` in the storage that ``spec`` describes, floating-point parts in ``dtype``.

    Args:
        weight: the matrix, torch layout.
        spec: structure wanted; its shape is the weight's.
        how: the algorithm; a dense spec ignores it, a packed one takes ``rtn`` for the low-rank names.
        gram: Gram of the matrix's inputs; ``svd`` and ``rtn`` do without (``rtn`` then searches an unweighted grid).
        dtype: of the stored factors.
        polish: rounds of coordinate descent over scales and codes after GPTQ.
    """
    if isinstance(spec, DenseSpec):
        return Dense(weight.to(dtype))
    if isinstance(spec, LowRankSpec):
        if how == "whitened" and gram is not None:
            a, b = whitened_factors(weight, gram, spec.rank)
        else:
            a, b = svd_factors(weight, spec.rank)
        return LowRank(a.to(dtype), b.to(dtype))
    return _packed(*_rounded(weight, spec, how, gram, polish), spec)


def compress_together(
    weights: Sequence[Float[Tensor, "out in"]],
    spec: DenseSpec | LowRankSpec | PackedSpec,
    how: How,
    gram: Float[Tensor, "in in"] | None,
    dtype: torch.dtype,
    polish: int = 0,
) -> list[Projection]:
    """:func:`compress` for matrices that share their inputs and their structure (`up` and `gate`).

    Rows are rounded independently of each other, so low-bit matrices are solved as one: half the sequential steps.
    """
    if not isinstance(spec, PackedSpec):
        return [compress(weight, spec, how, gram, dtype, polish) for weight in weights]
    codes, grid = _rounded(torch.cat(list(weights)), spec, how, gram, polish)
    rows = spec.shape[0]
    return [
        _packed(codes[start : start + rows], rows_of_grid(grid, start, start + rows), spec)
        for start in range(0, len(codes), rows)
    ]


def rows_of_grid(grid: Grid, start: int, stop: int) -> Grid:
    """The grid of some of the rows."""
    return replace(grid, scale=grid.scale[start:stop], zero=grid.zero[start:stop])


def _rounded(
    weight: Float[Tensor, "out in"], spec: PackedSpec, how: How, gram: Float[Tensor, "in in"] | None, polish: int
) -> tuple[UInt8[Tensor, "out in"], Grid]:
    weight = weight.float()
    if how == "gptq" and gram is not None:
        codes, grid = gptq(weight, gram, spec.bits, spec.group, damp=DAMP, symmetric=spec.symmetric)
        return refine(weight, codes, grid, ridged(gram, DAMP), spec.bits, polish)
    grid = fit_grid(weight, spec.bits, spec.group, symmetric=spec.symmetric)
    return encode(weight, grid, spec.bits), grid


def _packed(codes: UInt8[Tensor, "out in"], grid: Grid, spec: PackedSpec) -> Packed:
    return Packed.from_codes(codes, grid, bits=spec.bits, group=spec.group, symmetric=spec.symmetric)
