"""The size of a dense FFN, enough to plan a compression before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ffsplit.ffn.weights import FFNWeights


@dataclass(frozen=True)
class FFNShape:
    """Dimensions of one dense FFN and which of its biases exist.

    Attributes:
        homogeneous: the activation scales with its input, ``act(c z) = c act(z)`` for ``c > 0``, as ReLU does.
    """

    d_model: int
    d_ff: int
    gated: bool
    up_bias: bool = False
    gate_bias: bool = False
    down_bias: bool = False
    homogeneous: bool = False

    @classmethod
    def of(cls, ffn: FFNWeights) -> FFNShape:
        return cls(
            d_model=ffn.d_model,
            d_ff=ffn.d_ff,
            gated=ffn.gated,
            up_bias=ffn.up_bias is not None,
            gate_bias=ffn.gate_bias is not None,
            down_bias=ffn.down_bias is not None,
            homogeneous=_is_homogeneous(ffn.act),
        )

    @property
    def scales_through(self) -> bool:
        """Whether a factor on a neuron's row of `up` is the same factor on its activation."""
        return self.gated or self.homogeneous

    @property
    def matrices(self) -> int:
        """2 for a plain FFN, 3 for a gated one."""
        return 3 if self.gated else 2

    @property
    def weights(self) -> int:
        """Weights without biases: what "bits per weight" divides by."""
        return self.matrices * self.d_model * self.d_ff

    @property
    def neuron_biases(self) -> int:
        """Bias parameters that one neuron owns."""
        return int(self.up_bias) + int(self.gate_bias)

    @property
    def neuron_parameters(self) -> int:
        """Parameters that one neuron owns, biases included."""
        return self.matrices * self.d_model + self.neuron_biases

    @property
    def parameters(self) -> int:
        """All parameters: what the keep ratio divides by."""
        return self.d_ff * self.neuron_parameters + self.d_model * self.down_bias


@torch.no_grad()
def _is_homogeneous(act: nn.Module) -> bool:
    """Tried out on powers of two, which rounding spares; not with parameters, which a plan has not read."""
    if any(True for _ in act.parameters()) or any(True for _ in act.buffers()):
        return False
    grid = torch.linspace(-8, 8, 65, device="cpu").unsqueeze(0)
    try:
        values = act(grid)
        return all(torch.equal(act(factor * grid), factor * values) for factor in (0.25, 0.5, 2.0, 16.0))
    except (RuntimeError, TypeError):  # an activation that takes no plain batch of numbers
        return False
