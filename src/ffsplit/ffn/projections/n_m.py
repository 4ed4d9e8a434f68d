"""N weights of every M neighbours, and where they stand."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import pad

from ffsplit.ffn.projections.base import Projection, StorageSpec
from ffsplit.kernels.n_m import decode, n_m_linear, position_bits
from ffsplit.ops.packing import pack, packed_columns


class NMSpec(StorageSpec):
    """``n`` weights of every ``m`` along the inputs; a last short group counts (and is stored) as a whole one."""

    kind: Literal["n_m"] = "n_m"
    n: int = Field(ge=1)
    m: int = Field(ge=2, le=256)

    @model_validator(mode="after")
    def _sparse(self) -> NMSpec:
        if self.n >= self.m:
            raise ValueError(f"{self.n}:{self.m} is not sparse; n must be below m")
        return self

    @property
    def kept(self) -> int:
        """Stored weights of one row."""
        return -(-self.shape[1] // self.m) * self.n

    @property
    def position_bytes(self) -> int:
        """Of one row's packed positions."""
        return packed_columns(self.kept, position_bits(self.m))

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.kept

    def stored_bits(self, float_bits: int) -> int:
        return self.shape[0] * (self.kept * float_bits + 8 * self.position_bytes)

    @property
    def macs(self) -> int:
        """Half for 2:4, which has hardware; those of the dense matrix for every other pattern."""
        return self.parameters if (self.n, self.m) == (2, 4) else self.shape[0] * self.shape[1]

    def describe(self) -> str:
        return f"{self.n}:{self.m} sparse"


class NM(Projection):
    """Values ``[out, kept]`` in the order of their columns, and the packed position of each within its group."""

    positions: Tensor

    def __init__(self, spec: NMSpec, values: Float[Tensor, "out kept"], positions: Tensor) -> None:
        super().__init__()
        self.spec: NMSpec = spec
        self.values = nn.Parameter(values.contiguous())
        self.register_buffer("positions", positions)

    @classmethod
    def from_dense(cls, weight: Float[Tensor, "out in"], kept: Bool[Tensor, "out in"], n: int, m: int) -> NM:
        """The weights that ``kept`` marks, at most ``n`` of every ``m``; the others become zero.

        Raises:
            ValueError: a group has more.
        """
        spec = NMSpec(shape=(weight.shape[0], weight.shape[1]), n=n, m=m)
        short = (0, -weight.shape[1] % m)
        marks = pad(kept, short).view(weight.shape[0], -1, m)
        if bool((marks.sum(-1) > n).any()):
            raise ValueError(f"more than {n} of {m} weights are kept in some group")
        groups = pad(weight.masked_fill(~kept, 0), short).view_as(marks)
        # The marked places in order, then zeros from the unmarked ones where a group has fewer than n.
        where = (~marks).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :n].sort(dim=-1).values
        values = groups.gather(-1, where).flatten(1)
        return cls(spec, values, pack(where.to(torch.uint8).flatten(1), position_bits(m)))

    @classmethod
    def empty(cls, spec: NMSpec, dtype: torch.dtype, device: torch.device) -> NM:
        rows = spec.shape[0]
        positions = torch.empty(rows, spec.position_bytes, dtype=torch.uint8, device=device)
        return cls(spec, torch.empty(rows, spec.kept, dtype=dtype, device=device), positions)

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        spec, dtype = self.spec, dtype or self.values.dtype
        return decode(self.values, self.positions, n=spec.n, m=spec.m, columns=spec.shape[1], dtype=dtype)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return n_m_linear(x, self.values, self.positions, n=self.spec.n, m=self.spec.m, cache=self.derived)
