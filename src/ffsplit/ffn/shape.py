"""The size of a dense FFN, enough to plan a compression before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from ffsplit.ffn.weights import FFNWeights


@dataclass(frozen=True)
class FFNShape:
    """Dimensions of one dense FFN and which of its biases exist."""

    d_model: int
    d_ff: int
    gated: bool
    up_bias: bool = False
    gate_bias: bool = False
    down_bias: bool = False

    @classmethod
    def of(cls, ffn: FFNWeights) -> FFNShape:
        return cls(
            d_model=ffn.d_model,
            d_ff=ffn.d_ff,
            gated=ffn.gated,
            up_bias=ffn.up_bias is not None,
            gate_bias=ffn.gate_bias is not None,
            down_bias=ffn.down_bias is not None,
        )

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
