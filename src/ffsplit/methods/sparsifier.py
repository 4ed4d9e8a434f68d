"""The algorithm behind sparse storages: score the weights, choose which survive, fit the survivors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ffsplit.ffn.projections import NM, Masked, MaskedSpec, NMSpec, Projection, StorageSpec
from ffsplit.methods.compressors import DAMP, Compressor, GramOfInputs
from ffsplit.ops.sparsegpt import sparsegpt, sparsegpt_n_m
from ffsplit.ops.sparsity import best_mask, dass, n_m_mask, rows_mask, wanda
from ffsplit.ops.support import refit_support

WeightScore = Literal["magnitude", "wanda", "dass", "sparsegpt"]


@dataclass(frozen=True)
class Sparsifier(Compressor):
    """Sparse values in any places or in N of every M. Without a Gram every score is ``magnitude``.

    Attributes:
        score: what makes a weight worth keeping. In any places, ``magnitude`` and ``wanda`` compare the weights of one
            output with each other, ``sparsegpt`` those of a block of inputs, and ``dass`` all of a matrix: it weighs
            inputs and outputs, and either factor is void among weights that share it.
        ridge: of the least-squares fit of the survivors; None leaves them as the score's algorithm does.
        output_norms: for ``dass``, the norm of the activation that each output of the matrices leads to.
        alpha: for ``dass``, the power of that norm.
    """

    score: WeightScore = "sparsegpt"
    ridge: float | None = None
    output_norms: Float[Tensor, " out"] | None = None
    alpha: float = 0.0

    @property
    def needs_gram(self) -> bool:
        return self.score != "magnitude" or self.ridge is not None

    def fit(
        self, weights: Sequence[Tensor], spec: StorageSpec, gram: GramOfInputs, dtype: torch.dtype
    ) -> list[Projection]:
        assert isinstance(spec, MaskedSpec | NMSpec)
        fitted: list[Projection] = []
        for weight in weights:
            values, mask = self._sparse(weight, spec, gram)
            if self.ridge is not None and gram is not None:
                values = refit_support(weight, mask, gram, self.ridge)
            if isinstance(spec, MaskedSpec):
                fitted.append(Masked.from_dense(values.to(dtype), mask))
            else:
                fitted.append(NM.from_dense(values.to(dtype), mask, spec.n, spec.m))
        return fitted

    def _sparse(
        self, weight: Float[Tensor, "out in"], spec: MaskedSpec | NMSpec, gram: GramOfInputs
    ) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
        """Surviving values (as far as the score's own algorithm corrects them) and their places."""
        if self.score == "sparsegpt" and gram is not None:
            if isinstance(spec, MaskedSpec):
                return sparsegpt(weight, gram, spec.kept, damp=DAMP)
            return sparsegpt_n_m(weight, gram, spec.n, spec.m, damp=DAMP)
        score = self._scores(weight, gram)
        if isinstance(spec, NMSpec):
            return weight, n_m_mask(score, spec.n, spec.m)
        within = best_mask if self.score == "dass" else rows_mask
        return weight, within(score, spec.kept)

    def _scores(self, weight: Float[Tensor, "out in"], gram: GramOfInputs) -> Float[Tensor, "out in"]:
        if gram is None or self.score == "magnitude":
            return weight.double().abs()
        energy = gram.diagonal()
        if self.output_norms is None:
            return wanda(weight, energy)
        return dass(weight, energy, self.output_norms, self.alpha)
