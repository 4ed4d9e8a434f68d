"""Tables instead of products: a token is hashed, and one row of every table is added up."""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear

from ffsplit.ffn.projections.base import Spec
from ffsplit.ops.lookup import buckets


class LookupSpec(Spec):
    """Tables over hashes of the input.

    Attributes:
        d_model: inputs, and outputs of every row.
        tables: how many.
        bits: signs that make the hash of one table, which has ``2^bits`` rows.
    """

    d_model: PositiveInt
    tables: PositiveInt
    bits: int = Field(ge=1, le=16)

    @property
    def planes(self) -> int:
        return self.tables * self.bits

    @property
    def rows(self) -> int:
        return self.tables << self.bits

    @property
    def parameters(self) -> int:
        """Projections with their offsets, and the tables."""
        return self.planes * (self.d_model + 1) + self.rows * self.d_model

    @property
    def macs(self) -> int:
        """Of one token: the projections, and one row a table to be added."""
        return (self.planes + self.tables) * self.d_model

    def describe(self) -> str:
        return f"{self.tables:,} lookup tables of {1 << self.bits:,} rows"


class Lookup(nn.Module):
    """``sum_k table_k[hash_k(x)]``, the hash being the signs of ``x planes^T - offsets``."""

    planes: Tensor
    offsets: Tensor

    def __init__(
        self,
        spec: LookupSpec,
        planes: Float[Tensor, "planes d_model"],
        offsets: Float[Tensor, " planes"],
        rows: Float[Tensor, "rows d_model"],
    ) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("planes", planes.contiguous())
        self.register_buffer("offsets", offsets.contiguous())
        self.rows = nn.Parameter(rows.contiguous())

    @classmethod
    def empty(cls, spec: LookupSpec, dtype: torch.dtype, device: torch.device) -> Lookup:
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(spec, empty(spec.planes, spec.d_model), empty(spec.planes), empty(spec.rows, spec.d_model))

    def forward(self, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens d_model"]:
        projected = projections(x.reshape(-1, self.spec.d_model), self.planes, self.offsets)
        index = buckets(projected, self.spec.bits)
        first = torch.arange(self.spec.tables, device=x.device) << self.spec.bits
        return embedding_bag(index + first, self.rows, mode="sum").view(x.shape)


def projections(
    x: Float[Tensor, "tokens d_model"], planes: Float[Tensor, "planes d_model"], offsets: Float[Tensor, " planes"]
) -> Float[Tensor, "tokens planes"]:
    """Signed distances from the hyperplanes, in float32 whatever is cast around them: a rounded sign is another row."""
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.float(), planes.float(), -offsets.float())
