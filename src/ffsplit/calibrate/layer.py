"""What a method may know about the data of the FFN that it compresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from ffsplit.calibrate.cache import Activations
from ffsplit.calibrate.gradients import NeuronGradients
from ffsplit.calibrate.statistics import FFNStatistics, collect
from ffsplit.errors import DataError
from ffsplit.ffn.sum import SumFFN
from ffsplit.ffn.weights import FFNWeights
from ffsplit.ops.gram import add_gram


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

    @classmethod
    def zeros(cls, hidden: int, d_model: int, device: torch.device) -> RefitSums:
        shapes: tuple[tuple[int, ...], ...] = ((hidden, hidden), (hidden, d_model), ())
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))


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
        gradients: what the dense model's loss says about the neurons; None unless the configuration asked for it.
        memo: results that several methods tried on this layer share, by name.
        others: the FFNs that come later and are still dense, by their place in the execution order, for a method that
            works across layers; read when asked for.
        fitted: the sums that earlier FFNs have become, likewise; copies in float32.
        dtype: of the model's weights, to which what is fitted will be cast: hashes and thresholds are decided on what
            is left of them then.
        ahead: the inputs that later FFNs get while they and what lies before them are still dense, likewise; whoever
            asks drops them.
    """

    ffn: FFNWeights
    inputs: Activations
    name: str = "ffn"
    seed: int = 0
    corrections: Activations | None = None
    gradients: NeuronGradients | None = None
    memo: dict[str, Any] = field(default_factory=dict)
    others: Mapping[int, FFNWeights] = field(default_factory=dict)
    fitted: Mapping[int, SumFFN] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    ahead: Mapping[int, Activations] = field(default_factory=dict)
    _device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self._device = self.ffn.up.device

    @cached_property
    def statistics(self) -> FFNStatistics:
        """All statistics, the hidden Gram included."""
        return self._collected(hidden_gram=True)

    @cached_property
    def moments(self) -> FFNStatistics:
        """Everything but the hidden Gram, which is most of the work; the full statistics if they are there already."""
        full = self.__dict__.get("statistics")
        return full if full is not None else self._collected(hidden_gram=False)

    def _collected(self, *, hidden_gram: bool) -> FFNStatistics:
        statistics = collect(self.ffn, self.inputs, self._device, hidden_gram=hidden_gram)
        statistics.check_finite(self.name)
        return statistics

    def as_stored(self, tensor: Tensor) -> Tensor:
        """A tensor with the values that it will have in the model's dtype, in the dtype that fits are computed in."""
        return tensor.to(self.dtype).to(self.ffn.up)

    def chunks(self) -> Iterator[Float[Tensor, "tokens d_model"]]:
        """The inputs, one sequence at a time, on the compute device and in the dtype of the weights."""
        for chunk in self.inputs:
            yield chunk.to(device=self._device, dtype=self.ffn.up.dtype)

    def targets(self) -> Iterator[tuple[Float[Tensor, "tokens d_model"], Float[Tensor, "tokens d_model"]]]:
        """The inputs, one sequence at a time, and what a fit shall give for them before the output bias.

        That is the dense FFN's outputs and the corrections.
        """
        corrections = iter(self.corrections) if self.corrections is not None else None
        for x in self.chunks():
            y = linear(self.ffn.hidden(x), self.ffn.down)
            yield x, y if corrections is None else y + next(corrections).to(x)

    def refit_sums(
        self,
        hidden: Callable[[Float[Tensor, "tokens d_model"]], Float[Tensor, "tokens hidden"]],
    ) -> RefitSums:
        """Stream the inputs through ``hidden`` and sum what a refit of ``down`` needs.

        Args:
            hidden: the compressed hidden activations of a chunk of inputs.

        Raises:
            DataError: a sum holds NaN or Inf.
        """
        sums: RefitSums | None = None
        for x, target in self.targets():
            h, y = hidden(x).double(), target.double()
            if sums is None:
                sums = RefitSums.zeros(h.shape[1], y.shape[1], self._device)
            add_gram(sums.gram, h)
            sums.cross.addmm_(h.T, y)
            sums.energy.add_(y.square().sum())
        assert sums is not None, "refit_sums needs calibration inputs"
        if not bool(torch.isfinite(sums.gram).all() & torch.isfinite(sums.cross).all()):
            raise DataError(
                f"{self.name}: the sums of the refit hold NaN or Inf: the model overflows on this text in this dtype; "
                "calibrate in float32 or bfloat16"
            )
        return sums
