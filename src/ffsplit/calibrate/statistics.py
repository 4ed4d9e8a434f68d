"""Streaming sums over the tokens of one FFN: Grams of its input and hidden activations, moments of its neurons.

Everything kept is a sum (or a maximum), so partial statistics merge, all-reduce, save and resume.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from ffsplit.errors import DataError
from ffsplit.ffn.weights import FFNWeights
from ffsplit.ops.gram import add_gram


@dataclass
class FFNStatistics:
    """Sums over tokens, float64. ``h`` is the hidden activation, the input of ``down``; ``y`` the output before bias.

    Attributes:
        tokens: number of tokens, float64 scalar.
        sequences: number of sequences, float64 scalar.
        input_gram: sum of ``x^T x``.
        input_sum: sum of ``x``.
        input_abs_sum: sum of ``|x|``.
        hidden_gram: sum of ``h^T h``; 0 x 0 when only moments were collected (it is most of the work).
        hidden_square_sum: sum of ``h^2``.
        hidden_sum: sum of ``h``.
        hidden_abs_sum: sum of ``|h|``.
        hidden_max: largest ``|h|`` seen.
        hidden_active: tokens on which the neuron's output norm ``|h_j| ||down_j||`` is above the token's mean over
            neurons: near ``tokens`` for a heavy hitter, near 0 for a neuron that few tokens trigger.
        sequence_mean_square: sum over sequences of ``(mean over the sequence of |h|)^2`` (Minitron, 2407.14679).
    """

    tokens: Float[Tensor, ""]
    sequences: Float[Tensor, ""]
    input_gram: Float[Tensor, "d_model d_model"]
    input_sum: Float[Tensor, " d_model"]
    input_abs_sum: Float[Tensor, " d_model"]
    hidden_gram: Float[Tensor, "gram gram"]
    hidden_square_sum: Float[Tensor, " d_ff"]
    hidden_sum: Float[Tensor, " d_ff"]
    hidden_abs_sum: Float[Tensor, " d_ff"]
    hidden_max: Float[Tensor, " d_ff"]
    hidden_active: Float[Tensor, " d_ff"]
    sequence_mean_square: Float[Tensor, " d_ff"]

    @classmethod
    def zeros(
        cls, d_model: int, d_ff: int, device: torch.device | str = "cpu", *, hidden_gram: bool = True
    ) -> FFNStatistics:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            tokens=zeros(),
            sequences=zeros(),
            input_gram=zeros(d_model, d_model),
            input_sum=zeros(d_model),
            input_abs_sum=zeros(d_model),
            hidden_gram=zeros(d_ff, d_ff) if hidden_gram else zeros(0, 0),
            hidden_square_sum=zeros(d_ff),
            hidden_sum=zeros(d_ff),
            hidden_abs_sum=zeros(d_ff),
            hidden_max=zeros(d_ff),
            hidden_active=zeros(d_ff),
            sequence_mean_square=zeros(d_ff),
        )

    def update(self, ffn: FFNWeights, x: Float[Tensor, "tokens d_model"]) -> None:
        """Add the tokens of one sequence; one without tokens adds nothing."""
        if not x.shape[0]:
            return
        hidden = ffn.hidden(x)
        size = hidden.abs()
        contribution = size * ffn.down.norm(dim=0)
        wide = hidden.double()
        self.tokens += x.shape[0]
        self.sequences += 1
        add_gram(self.input_gram, x)
        self.input_sum += x.double().sum(0)
        self.input_abs_sum += x.double().abs().sum(0)
        if self.hidden_gram.numel():
            add_gram(self.hidden_gram, wide)
        self.hidden_square_sum += wide.square().sum(0)
        self.hidden_sum += wide.sum(0)
        absolute = wide.abs()
        self.hidden_abs_sum += absolute.sum(0)
        torch.maximum(self.hidden_max, size.amax(0).double(), out=self.hidden_max)
        self.hidden_active += (contribution > contribution.mean(dim=1, keepdim=True)).sum(0)
        self.sequence_mean_square += absolute.mean(0).square()

    def merge(self, other: FFNStatistics) -> None:
        """Add the statistics of other tokens (another process, another run)."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name).to(self.tokens.device)
            if field.name == "hidden_max":
                torch.maximum(mine, theirs, out=mine)
            else:
                mine += theirs

    @property
    def hidden_variance(self) -> Float[Tensor, " d_ff"]:
        """Variance of ``h_j`` over tokens."""
        mean = self.hidden_sum / self.tokens
        return (self.hidden_square_sum / self.tokens - mean.square()).clamp_min(0)

    def check_finite(self, layer: str) -> None:
        """Raise DataError naming the first sum that holds NaN or Inf."""
        for field in fields(self):
            if not torch.isfinite(getattr(self, field.name)).all():
                raise DataError(
                    f"{layer}: the calibration statistic {field.name} holds NaN or Inf: the model overflows on this "
                    "text in this dtype; calibrate in float32 or bfloat16"
                )

    def save(self, file: str | Path) -> None:
        """Write the sums as safetensors."""
        save_file({field.name: getattr(self, field.name).cpu().contiguous() for field in fields(self)}, file)

    @classmethod
    def load(cls, file: str | Path) -> FFNStatistics:
        """Read what :meth:`save` wrote."""
        return cls(**load_file(file))


def collect(
    ffn: FFNWeights,
    inputs: Iterable[Float[Tensor, "tokens d_model"]],
    device: torch.device | str = "cpu",
    *,
    hidden_gram: bool = True,
) -> FFNStatistics:
    """Statistics of one FFN over its inputs, one chunk a sequence; without the hidden Gram if it is not wanted."""
    statistics = FFNStatistics.zeros(ffn.d_model, ffn.d_ff, device, hidden_gram=hidden_gram)
    for x in inputs:
        statistics.update(ffn, x.to(device=device, dtype=ffn.up.dtype))
    return statistics
