"""The dense weights of one feed-forward network, independent of the model they came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear


@dataclass(frozen=True)
class FFNWeights:
    """One dense FFN in the torch layout ``[out, in]``.

    Gated:  ``FFN(x) = (act(x gate^T + gate_bias) * (x up^T + up_bias)) down^T + down_bias``.
    Plain:  ``FFN(x) = act(x up^T + up_bias) down^T + down_bias``.

    Neuron ``j`` owns row ``j`` of ``up`` (and ``gate``) and column ``j`` of ``down``.
    """

    up: Float[Tensor, "d_ff d_model"]
    down: Float[Tensor, "d_model d_ff"]
    act: nn.Module
    gate: Float[Tensor, "d_ff d_model"] | None = None
    up_bias: Float[Tensor, " d_ff"] | None = None
    gate_bias: Float[Tensor, " d_ff"] | None = None
    down_bias: Float[Tensor, " d_model"] | None = None

    @property
    def d_ff(self) -> int:
        return self.up.shape[0]

    @property
    def d_model(self) -> int:
        return self.up.shape[1]

    @property
    def gated(self) -> bool:
        return self.gate is not None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that exist, by field name."""
        names = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def n_parameters(self) -> int:
        """Stored parameters of the dense FFN, biases included."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def activations(self, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens d_ff"]:
        """``act(gate)``, or ``act(up)`` without a gate: what decides whether a neuron matters for a token."""
        if self.gate is None:
            return self.act(linear(x, self.up, self.up_bias))  # type: ignore[no-any-return]
        return self.act(linear(x, self.gate, self.gate_bias))  # type: ignore[no-any-return]

    def hidden(self, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens d_ff"]:
        """The neurons' activations h, the input of ``down``."""
        a = self.activations(x)
        return a if self.gate is None else a * linear(x, self.up, self.up_bias)

    def __call__(self, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens d_model"]:
        return linear(self.hidden(x), self.down, self.down_bias)

    def take(self, neurons: Int[Tensor, " kept"]) -> FFNWeights:
        """The FFN of a subset of the neurons, in the given order, with ``down_bias`` kept."""
        return replace(
            self,
            up=self.up[neurons],
            down=self.down[:, neurons],
            gate=None if self.gate is None else self.gate[neurons],
            up_bias=None if self.up_bias is None else self.up_bias[neurons],
            gate_bias=None if self.gate_bias is None else self.gate_bias[neurons],
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> FFNWeights:
        """The same FFN with ``function`` applied to every tensor (a cast or a move)."""
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)


def side_by_side(ffns: Sequence[FFNWeights]) -> FFNWeights:
    """One FFN of the neurons of several: on any input it computes the sum of what they compute.

    Args:
        ffns: with one activation, and with the same of gate and biases.
    """

    def joined(name: str) -> Tensor | None:
        parts = [getattr(ffn, name) for ffn in ffns]
        return None if parts[0] is None else torch.cat(parts)

    changed: dict[str, Any] = {name: joined(name) for name in ("up", "gate", "up_bias", "gate_bias")}
    down, biases = torch.cat([ffn.down for ffn in ffns], dim=1), [ffn.down_bias for ffn in ffns]
    bias = torch.stack([bias for bias in biases if bias is not None]).sum(0) if biases[0] is not None else None
    return replace(ffns[0], **changed, down=down, down_bias=bias)


def joined_biases(
    biases: Sequence[Tensor | None], sizes: Sequence[int], dtype: torch.dtype
) -> Float[Tensor, " d_ff"] | None:
    """The biases of neighbouring parts of an FFN in a row.

    Args:
        biases: of each part; zeros for a part without one. None if no part has any.
        sizes: neurons of each part.
        dtype: of the result.
    """
    present = next((bias for bias in biases if bias is not None), None)
    if present is None:
        return None
    parts = [present.new_zeros(size) if bias is None else bias for bias, size in zip(biases, sizes, strict=True)]
    return torch.cat(parts).to(dtype)
