"""All branches of a low-bit FFN decoded into one dense FFN, gate and up in one matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from ffsplit.kernels.activations import ACTIVATIONS, COLUMNS, HALVES, activate, biased


@dataclass(frozen=True)
class DenseFFN:
    """A dense FFN.

    Attributes:
        inner: ``[up; gate]`` or ``up``: ``[rows, d_model]``.
        down: ``[d_model, d_ff]``.
        up_bias: ``[d_ff]``; likewise ``gate_bias``.
        bias: ``[d_model]``, of the output.
        act: one of :data:`ffsplit.kernels.activations.ACTIVATIONS`.
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

        Gate and up are one product where a kernel goes on with its halves, which it does not mind to be strided. Else
        they are two: torch's activation loses more on strided halves than a launch costs.
        """
        act = ACTIVATIONS[self.act]
        if self.gated and x.is_cuda and x.dtype in HALVES and self.d_ff % COLUMNS == 0:
            up, gate = torch.split(linear(x, self.inner), self.d_ff, -1)
            hidden = activate(self.act, up, gate, self.up_bias, self.gate_bias)
            if hidden is None:
                hidden = act(biased(gate, self.gate_bias)) * biased(up, self.up_bias)
            return linear(hidden, self.down, self.bias)
        up = linear(x, self.inner[: self.d_ff], self.up_bias)
        if not self.gated:
            return linear(act(up), self.down, self.bias)
        gate = linear(x, self.inner[self.d_ff :], self.gate_bias)
        return linear(act(gate).mul_(up), self.down, self.bias)
