"""What a method may know about the data of the FFN that it compresses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from ffsplit.calibrate.cache import Activations
from ffsplit.calibrate.statistics import FFNStatistics, collect
from ffsplit.ffn.weights import FFNWeights


@dataclass(frozen=True)
class RefitSums:
    """Sums for a least-squares fit ``y ~ h W^T``, float64.

    Attributes:
        gram: sum of ``h^T h`` of the compressed hidden activations.
        cross: sum of ``h^T y`` with the target outputs ``y`` (before ``down_bias``).
        energy: sum of ``y^2``.
    """

    gram: Float[Tensor, "hidden hidden"]
    cross: Float[Tensor, "hidden d_model"]
    energy: Float[Tensor, ""]


@dataclass
class LayerData:
    """The calibration inputs of one FFN and the statistics of its dense form, computed when first asked for.

    Attributes:
        ffn: the dense FFN, on the compute device.
        inputs: one ``[tokens, d_model]`` chunk a sequence; may be empty for a method that needs no data.
        name: the layer's path, for messages.
        seed: for methods that draw random numbers.
        corrections: what to add to the dense FFN's outputs on each chunk of ``inputs`` to get the targets of a refit
            (see :mod:`ffsplit.calibrate.drift`); None means nothing.
    """

    ffn: FFNWeights
    inputs: Activations
    name: str = "ffn"
    seed: int = 0
    corrections: Activations | None = None
    _device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self._device = self.ffn.up.device

    @cached_property
    def statistics(self) -> FFNStatistics:
        statistics = collect(self.ffn, self.inputs, self._device)
        statistics.check_finite(self.name)
        return statistics

    def refit_sums(
        self,
        hidden: Callable[[Float[Tensor, "tokens d_model"]], Float[Tensor, "tokens hidden"]],
        subtract: Callable[[Float[Tensor, "tokens d_model"]], Float[Tensor, "tokens d_model"]] | None = None,
    ) -> RefitSums:
        """Stream the inputs through ``hidden`` and sum what a refit of ``down`` needs.

        Args:
            hidden: the compressed hidden activations of a chunk of inputs.
            subtract: a part of the output that is already decided (another branch), taken off the targets.
        """
        sums: RefitSums | None = None
        corrections = iter(self.corrections) if self.corrections is not None else None
        for chunk in self.inputs:
            x = chunk.to(device=self._device, dtype=self.ffn.up.dtype)
            y = linear(self.ffn.hidden(x), self.ffn.down)
            if corrections is not None:
                y = y + next(corrections).to(x)
            if subtract is not None:
                y = y - subtract(x)
            h, y = hidden(x).double(), y.double()
            part = RefitSums(h.T @ h, h.T @ y, y.square().sum())
            sums = part if sums is None else _add(sums, part)
        assert sums is not None, "refit_sums needs calibration inputs"
        return sums


def _add(total: RefitSums, part: RefitSums) -> RefitSums:
    total.gram.add_(part.gram)
    total.cross.add_(part.cross)
    total.energy.add_(part.energy)
    return total
