"""For every token a fixed number of inputs of each projection: those with the largest part in its output."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ffsplit.ffn.selectors.base import Selector, SelectorSpecBase, Which, largest


class TopInputsSpec(SelectorSpecBase):
    """How many inputs work.

    Attributes:
        neurons: of the branch.
        d_model: of the branch.
        gated: the branch has a gate.
        inputs: of `up` (and of `gate`) that work for a token.
        hidden: of `down`.
    """

    kind: Literal["top_inputs"] = "top_inputs"
    neurons: int = Field(ge=1)
    d_model: int = Field(ge=1)
    gated: bool
    inputs: int = Field(ge=1)
    hidden: int = Field(ge=1)

    @property
    def parameters(self) -> int:
        return self.d_model * (2 if self.gated else 1) + self.neurons

    def check(self, neurons: int, d_model: int) -> None:
        if (neurons, d_model) != (self.neurons, self.d_model):
            raise ValueError(
                f"the selector is for {self.neurons} neurons of {self.d_model} inputs, the branch has {neurons} of "
                f"{d_model}"
            )
        if self.inputs > d_model or self.hidden > neurons:
            raise ValueError(f"{self.inputs} of {d_model} inputs or {self.hidden} of {neurons} neurons cannot work")

    def macs(self, up: int, gate: int, down: int) -> float:
        """Which inputs work is found from the inputs alone; weighing them is one product each."""
        weighed = self.parameters
        return weighed + (up + gate) * self.inputs / self.d_model + down * self.hidden / self.neurons

    def describe(self) -> str:
        return f"{self.inputs:,} of {self.d_model:,} inputs, {self.hidden:,} of {self.neurons:,} neurons a token"


class TopInputs(Selector):
    """The inputs with the largest product of their size and the length of their column of the weight."""

    up: Tensor
    gate: Tensor | None
    down: Tensor

    def __init__(
        self,
        spec: TopInputsSpec,
        up: Float[Tensor, " d_model"],
        down: Float[Tensor, " neurons"],
        gate: Float[Tensor, " d_model"] | None = None,
    ) -> None:
        """The lengths of the columns of each projection."""
        super().__init__()
        self.spec: TopInputsSpec = spec
        self.register_buffer("up", up.contiguous())
        self.register_buffer("down", down.contiguous())
        self.register_buffer("gate", None if gate is None else gate.contiguous())

    @classmethod
    def empty(cls, spec: TopInputsSpec, dtype: torch.dtype, device: torch.device) -> TopInputs:
        def lengths(count: int) -> Tensor:
            return torch.empty(count, dtype=dtype, device=device)

        gate = lengths(spec.d_model) if spec.gated else None
        return cls(spec, lengths(spec.d_model), lengths(spec.neurons), gate)

    def inputs(self, x: Float[Tensor, "*tokens d_model"], which: Which) -> Float[Tensor, "*tokens d_model"]:
        lengths = self.gate if which == "gate" else self.up
        assert lengths is not None
        return _strongest(x, lengths, self.spec.inputs)

    def hidden(self, h: Float[Tensor, "*tokens neurons"]) -> Float[Tensor, "*tokens neurons"]:
        return _strongest(h, self.down, self.spec.hidden)


def _strongest(values: Tensor, lengths: Tensor, count: int) -> Tensor:
    """The values with the largest ``|value| length``, zero elsewhere."""
    kept = largest(values.float().abs() * lengths.float(), count)
    return torch.where(kept, values, torch.zeros_like(values))
