"""Turning one matrix into a storage, given the Gram of its inputs."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ffsplit.ffn.spec import DenseSpec, LowRankSpec, PackedSpec
from ffsplit.ffn.storage import Dense, LowRank, Packed, Projection
from ffsplit.ops.gptq import gptq
from ffsplit.ops.lowrank import svd_factors, whitened_factors
from ffsplit.ops.rounding import encode, fit_grid

LowRankHow = Literal["svd", "whitened"]
RoundHow = Literal["rtn", "gptq"]
How = Literal["svd", "whitened", "rtn", "gptq"]
DATA_FREE = frozenset({"svd", "rtn"})


def compress(
    weight: Float[Tensor, "out in"],
    spec: DenseSpec | LowRankSpec | PackedSpec,
    how: How,
    gram: Float[Tensor, "in in"] | None,
    dtype: torch.dtype,
) -> Projection:
    """``weight`` in the storage that ``spec`` describes, floating-point parts in ``dtype``.

    Args:
        weight: the matrix, torch layout.
        spec: structure wanted; its shape is the weight's.
        how: the algorithm; a dense spec ignores it, a packed one takes ``rtn`` for the low-rank names.
        gram: Gram of the matrix's inputs; ``svd`` and ``rtn`` do without (``rtn`` then searches an unweighted grid).
        dtype: of the stored factors.
    """
    if isinstance(spec, DenseSpec):
        return Dense(weight.to(dtype))
    if isinstance(spec, LowRankSpec):
        if how == "whitened" and gram is not None:
            a, b = whitened_factors(weight, gram, spec.rank)
        else:
            a, b = svd_factors(weight, spec.rank)
        return LowRank(a.to(dtype), b.to(dtype))
    return _packed(weight, spec, how, gram)


def _packed(
    weight: Float[Tensor, "out in"], spec: PackedSpec, how: How, gram: Float[Tensor, "in in"] | None
) -> Packed:
    weight = weight.float()
    if how == "gptq" and gram is not None:
        codes, grid = gptq(weight, gram, spec.bits, spec.group, symmetric=spec.symmetric)
    else:
        grid = fit_grid(weight, spec.bits, spec.group, symmetric=spec.symmetric)
        codes = encode(weight, grid, spec.bits)
    return Packed.from_codes(codes, grid, bits=spec.bits, group=spec.group, symmetric=spec.symmetric)
