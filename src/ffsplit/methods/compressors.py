"""Turning matrices into a storage, given the Gram of their inputs. A method hands its compressor to the fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Float16, Int, UInt8
from torch import Tensor

from ffsplit.ffn.projections import (
    Dense,
    DenseSpec,
    Float8,
    Float8Spec,
    Int8Dynamic,
    Int8DynamicSpec,
    LowRank,
    LowRankSpec,
    OutlierColumns,
    OutlierColumnsSpec,
    OutlierWeights,
    OutlierWeightsSpec,
    Packed,
    PackedSpec,
    Projection,
    StorageSpec,
)
from ffsplit.ops.gptq import gptq
from ffsplit.ops.input_scale import scale_inputs, search_input_scale
from ffsplit.ops.linalg import ridged
from ffsplit.ops.lowrank import scaled_factors, svd_factors, whitened_factors
from ffsplit.ops.outliers import (
    absorbing_columns,
    excess_of,
    extremes,
    other_columns,
    remaining_gram,
    weak_columns,
    weak_weights,
)
from ffsplit.ops.refine import output_error, refine
from ffsplit.ops.rounding import Grid, decode, round_to_nearest

RoundHow = Literal["rtn", "awq", "gptq"]
# Ridge on the Gram of GPTQ and of the descent after it, so that neither fits the calibration text alone.
DAMP = 0.01
GramOfInputs = Float[Tensor, "in in"] | None


class Compressor(ABC):
    """An algorithm that finds the numbers of one kind of storage. Calling it compresses one matrix.

    A dense structure needs no algorithm: the matrix is stored as it is, whichever compressor is asked.
    """

    @property
    @abstractmethod
    def needs_gram(self) -> bool:
        """Whether it looks at the Gram of the inputs; one that does not is never given any."""

    @abstractmethod
    def fit(
        self, weights: Sequence[Tensor], spec: StorageSpec, gram: GramOfInputs, dtype: torch.dtype
    ) -> list[Projection]:
        """The matrices ``[out, in]``, which share inputs and structure, in the storage that ``spec`` describes."""

    def together(
        self, weights: Sequence[Tensor], spec: StorageSpec, gram: GramOfInputs, dtype: torch.dtype
    ) -> list[Projection]:
        """Matrices that share their inputs and their structure (`up` and `gate`).

        Args:
            weights: each ``[out, in]``, torch layout.
            spec: structure wanted of each; its shape is theirs.
            gram: ``sum x^T x`` of the inputs, or None without data.
            dtype: of the stored floating-point parts.
        """
        if isinstance(spec, DenseSpec):
            return [Dense(weight.to(dtype)) for weight in weights]
        return self.fit(weights, spec, gram, dtype)

    def __call__(
        self, weight: Float[Tensor, "out in"], spec: StorageSpec, gram: GramOfInputs, dtype: torch.dtype
    ) -> Projection:
        """:meth:`together` for one matrix."""
        return self.together([weight], spec, gram, dtype)[0]


@dataclass(frozen=True)
class TruncatedSVD(Compressor):
    """Low rank: plain, or in the norm of the inputs (``whitened``)."""

    whitened: bool = False

    @property
    def needs_gram(self) -> bool:
        return self.whitened

    def fit(
        self, weights: Sequence[Tensor], spec: StorageSpec, gram: GramOfInputs, dtype: torch.dtype
    ) -> list[Projection]:
        assert isinstance(spec, LowRankSpec)
        fitted: list[Projection] = []
        for weight in weights:
            if self.whitened and gram is not None:
                a, b = whitened_factors(weight, gram, spec.rank)
            else:
                a, b = svd_factors(weight, spec.rank)
            fitted.append(LowRank(a.to(dtype), b.to(dtype)))
        return fitted


@dataclass(frozen=True)
class ScaledSVD(Compressor):
    """Low rank with one weight an input, known beforehand.

    Attributes:
        scale: of each input.
    """

    scale: Float[Tensor, " in"]

    @property
    def needs_gram(self) -> bool:
        return False

    def fit(
        self, weights: Sequence[Tensor], spec: StorageSpec, gram: GramOfInputs, dtype: torch.dtype
    ) -> list[Projection]:
        assert isinstance(spec, LowRankSpec)
        factors = (scaled_factors(weight, self.scale, spec.rank) for weight in weights)
        return [LowRank(a.to(dtype), b.to(dtype)) for a, b in factors]


@dataclass(frozen=True)
class Rounding(Compressor):
    """Low-bit codes: to nearest without data, to nearest on searched ranges or GPTQ with it.

    Attributes:
        how: the algorithm. ``awq`` is to nearest with ranges searched for the least error; the scaled inputs that go
            with it are the structure's matter, and GPTQ can have them too.
        polish: rounds of coordinate descent over scales and codes after GPTQ.
    """

    how: RoundHow = "gptq"
    polish: int = 0

    @property
    def needs_gram(self) -> bool:
        return self.how != "rtn"

    def fit(
        self, weights: Sequence[Tensor], spec: StorageSpec, gram: GramOfInputs, dtype: torch.dtype
    ) -> list[Projection]:
        """Rows are rounded independently of each other, so the matrices are solved as one: half the steps."""
        if isinstance(spec, OutlierColumnsSpec):
            return self._beside_outliers(weights, spec, gram, dtype)
        if isinstance(spec, OutlierWeightsSpec):
            return [self._under_outliers(weight, spec, gram, dtype) for weight in weights]
        assert isinstance(spec, PackedSpec)
        weight = torch.cat(list(weights)).float()
        if spec.input_scale:
            codes, grid, multiplier = self._scaled(weight, spec, gram)
        else:
            (codes, grid), multiplier = self._rounded(weight, spec, gram), None
        rows = spec.shape[0]
        return [
            Packed.from_codes(
                codes[start : start + rows],
                rows_of_grid(grid, start, start + rows),
                bits=spec.bits,
                group=spec.group,
                symmetric=spec.symmetric,
                input_scale=multiplier,
            )
            for start in range(0, len(codes), rows)
        ]

    def _beside_outliers(
        self, weights: Sequence[Tensor], spec: OutlierColumnsSpec, gram: GramOfInputs, dtype: torch.dtype
    ) -> list[Projection]:
        """The weakest columns of all matrices together stay in full and absorb the error of the others."""
        weight = torch.cat(list(weights)).float()
        codes, grid = round_to_nearest(weight, spec.packed.bits, spec.packed.group, symmetric=spec.packed.symmetric)
        index = weak_columns(weight, decode(codes, grid, torch.float32), gram, spec.outliers)
        others = other_columns(index, spec.shape[1])
        left = None if gram is None else remaining_gram(gram, index, others, DAMP)
        fitted: list[Projection] = []
        rest = self.fit([matrix[:, others] for matrix in weights], spec.packed, left, dtype)
        for matrix, packed in zip(weights, rest, strict=True):
            assert isinstance(packed, Packed)
            values = matrix[:, index]
            if gram is not None:
                values = absorbing_columns(matrix, packed.dense(torch.float64), gram, index, others, DAMP)
            fitted.append(OutlierColumns(packed, index, values.to(dtype)))
        return fitted

    def _under_outliers(
        self, weight: Float[Tensor, "out in"], spec: OutlierWeightsSpec, gram: GramOfInputs, dtype: torch.dtype
    ) -> OutlierWeights:
        """What sticks out of its group at the weakest weights is stored as it is; the rest, now tame, is rounded."""
        weight, inside = weight.float(), spec.packed
        # Rounded as if no group had any outlier: on the ranges that are then left, what sticks out has a large error.
        far = extremes(weight, inside.group)
        trimmed = _without(weight, far, excess_of(weight, far, inside.group))
        codes, grid = round_to_nearest(trimmed, inside.bits, inside.group, symmetric=inside.symmetric)
        places = weak_weights(weight, decode(codes, grid, torch.float32), gram, spec.outliers, DAMP)
        values = excess_of(weight, places, inside.group).to(dtype)
        tame = _without(weight, places, values.float())
        (packed,) = self.fit([tame], inside, gram, dtype)
        assert isinstance(packed, Packed)
        return OutlierWeights.at(packed, places, values)

    def _scaled(
        self, weight: Float[Tensor, "out in"], spec: PackedSpec, gram: GramOfInputs
    ) -> tuple[UInt8[Tensor, "out in"], Grid, Float16[Tensor, " in"]]:
        """Inputs scaled as suits rounding to nearest, or not at all if GPTQ does better so."""
        plain = torch.ones(weight.shape[1], dtype=torch.float16, device=weight.device)
        if gram is None:
            return *self._rounded(weight, spec, gram), plain
        searched = search_input_scale(
            weight, gram, spec.bits, spec.group, symmetric=spec.symmetric, scale_bits=spec.scale_bits
        )
        best, least = None, float("inf")
        for multiplier in (searched, plain) if self.how == "gptq" else (searched,):
            scaled, scaled_gram = scale_inputs(weight, gram, multiplier)
            codes, grid = self._rounded(scaled, spec, scaled_gram)
            error = float(output_error(scaled, decode(codes, grid, torch.float32), scaled_gram))
            if best is None or error < least:
                best, least = (codes, grid, multiplier), error
        assert best is not None
        return best

    def _rounded(
        self, weight: Float[Tensor, "out in"], spec: PackedSpec, gram: GramOfInputs
    ) -> tuple[UInt8[Tensor, "out in"], Grid]:
        symmetric, scale_bits = spec.symmetric, spec.scale_bits
        if self.how == "gptq" and gram is not None:
            codes, grid = gptq(
                weight, gram, spec.bits, spec.group, damp=DAMP, symmetric=symmetric, scale_bits=scale_bits
            )
            return refine(weight, codes, grid, ridged(gram, DAMP), spec.bits, self.polish)
        importance = None if gram is None or self.how != "awq" else gram.diagonal().clamp_min(0.0) + 1e-12
        return round_to_nearest(
            weight,
            spec.bits,
            spec.group,
            symmetric=symmetric,
            search=importance is not None,
            importance=importance,
            scale_bits=scale_bits,
        )


@dataclass(frozen=True)
class Nearest(Compressor):
    """Storages that take each row as it is and round it to nearest."""

    @property
    def needs_gram(self) -> bool:
        return False

    def fit(
        self, weights: Sequence[Tensor], spec: StorageSpec, gram: GramOfInputs, dtype: torch.dtype
    ) -> list[Projection]:
        if isinstance(spec, Float8Spec):
            return [Float8.from_dense(weight, spec, dtype) for weight in weights]
        assert isinstance(spec, Int8DynamicSpec)
        return [Int8Dynamic.from_dense(weight, spec, dtype) for weight in weights]


SVD = TruncatedSVD()
WHITENED = TruncatedSVD(whitened=True)
NEAREST = Nearest()


def _without(
    weight: Float[Tensor, "out in"], places: Int[Tensor, " count"], values: Float[Tensor, " count"]
) -> Float[Tensor, "out in"]:
    """The matrix less some values at some places, which are counted row by row."""
    return weight.flatten().index_add(0, places, values, alpha=-1).view_as(weight)


def rows_of_grid(grid: Grid, start: int, stop: int) -> Grid:
    """The grid of some of the rows."""
    row_scale = None if grid.row_scale is None else grid.row_scale[start:stop]
    return replace(grid, scale=grid.scale[start:stop], zero=grid.zero[start:stop], row_scale=row_scale)
