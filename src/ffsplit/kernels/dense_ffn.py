"""All branches of a low-bit FFN decoded into one dense FFN, gate and up in one matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda v: v,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda v: functional.gelu(v, approximate="tanh"),
    "relu": functional.relu,
    "relu_squared": lambda v: functional.relu(v).square(),
}
"""What kernels over whole FFNs can compute; their sources count them in this order."""


@dataclass(frozen=True)
class DenseFFN:
    """A dense FFN.

    Attributes:
        inner: ``[up; gate]`` or ``up``: ``[rows, d_model]``.
        down: ``[d_model, d_ff]``.
        up_bias: ``[d_ff]``; likewise ``gate_bias``.
        bias: ``[d_model]``, of the output.
        act: one of :data:`ACTIVATIONS`.
    """

    inner: Tensor
    down: Tensor
    up_bias: Tensor | None
    gate_bias: Tensor | None
    bias: Tensor | None
    act: str

    @property
    def d_ff(self) -> int:
        return self.down.shape[1]

    @property
    def gated(self) -> bool:
        return self.inner.shape[0] != self.d_ff

    def __call__(self, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens d_model"]:
        """The outputs.

        Gate and up are products of their own although they lie in one matrix: the halves of one product are strided,
        and what the activation loses on them is more than a launch costs.
        """
        up = functional.linear(x, self.inner[: self.d_ff], self.up_bias)
        act = ACTIVATIONS[self.act]
        if not self.gated:
            return functional.linear(act(up), self.down, self.bias)
        gate = functional.linear(x, self.inner[self.d_ff :], self.gate_bias)
        return functional.linear(act(gate).mul_(up), self.down, self.bias)
