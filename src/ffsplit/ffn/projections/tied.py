"""Another FFN's projection, plus a low-rank difference: the weights are stored once, by their owner."""

from __future__ import annotations

from itertools import chain
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear

from ffsplit.errors import ModelError
from ffsplit.ffn.projections.base import Projection, StorageSpec

Place = Literal["up", "gate", "down"]


class TiedSpec(StorageSpec):
    """``W_owner + a b``: only ``a [out, rank]`` and ``b [rank, in]`` are stored here.

    Attributes:
        owner: site name of the FFN whose projection it is, as the model that was compressed spells it.
        branch: of the owner's sum.
        projection: of that branch.
        rank: of the difference; 0 means none.
    """

    kind: Literal["tied"] = "tied"
    owner: str = Field(min_length=1)
    branch: int = Field(default=0, ge=0)
    projection: Place
    rank: int = Field(default=0, ge=0)

    @property
    def parameters(self) -> int:
        return self.rank * (self.shape[0] + self.shape[1])

    def stored_bits(self, float_bits: int) -> int:
        return self.parameters * float_bits

    def describe(self) -> str:
        difference = f" plus rank {self.rank}" if self.rank else ""
        return f"tied to {self.owner}{difference}"

    @property
    def macs(self) -> int:
        """Sharing saves memory, not work."""
        return self.shape[0] * self.shape[1] + self.parameters


class Tied(Projection):
    """``W = W_owner + a b``.

    The owner is no submodule: it is in no ``state_dict`` twice, and moving, casting or freezing the model reaches it
    through its own FFN only. An empty one has no owner until :meth:`link` gives it one.
    """

    a: nn.Parameter | None
    b: nn.Parameter | None

    def __init__(
        self,
        spec: TiedSpec,
        owner: Projection | None = None,
        a: Float[Tensor, "out rank"] | None = None,
        b: Float[Tensor, "rank in"] | None = None,
    ) -> None:
        super().__init__()
        self.spec: TiedSpec = spec
        self.register_parameter("a", None if a is None else nn.Parameter(a.contiguous()))
        self.register_parameter("b", None if b is None else nn.Parameter(b.contiguous()))
        # In a tuple, where nn.Module does not look for submodules and deepcopy still finds it.
        self._owner: tuple[Projection, ...] = ()
        if owner is not None:
            self.link(owner)

    @classmethod
    def empty(cls, spec: TiedSpec, dtype: torch.dtype, device: torch.device) -> Tied:
        if not spec.rank:
            return cls(spec)
        rows, columns = spec.shape
        a = torch.empty(rows, spec.rank, dtype=dtype, device=device)
        return cls(spec, None, a, torch.empty(spec.rank, columns, dtype=dtype, device=device))

    def link(self, owner: Projection) -> None:
        """Use this projection's weights from now on.

        Raises:
            ModelError: it has another shape, or is tied itself.
        """
        if isinstance(owner, Tied):
            raise ModelError(f"a projection is tied to {self._where}, which is tied itself and stores no weights")
        if tuple(owner.spec.shape) != tuple(self.spec.shape):
            raise ModelError(
                f"a projection of shape {tuple(self.spec.shape)} is tied to {self._where}, whose shape is "
                f"{tuple(owner.spec.shape)}"
            )
        self._owner = (owner,)

    @property
    def owner(self) -> Projection:
        """Raises ModelError while there is none."""
        if not self._owner:
            raise ModelError(f"a projection is tied to {self._where} and was never linked to it")
        return self._owner[0]

    @property
    def _where(self) -> str:
        return f"{self.spec.owner} (branch {self.spec.branch}, {self.spec.projection})"

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        weight = self.owner.dense(dtype)
        if self.a is None or self.b is None:
            return weight
        return weight.to(self.a.device) + self.a.to(weight.dtype) @ self.b.to(weight.dtype)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        out = self._through_owner(x)
        return out if self.a is None or self.b is None else out + linear(linear(x, self.b), self.a)

    def _through_owner(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        owner = self.owner
        if device_of(owner) == x.device:
            return owner(x)  # type: ignore[no-any-return]
        # While a model is compressed, or spread over devices, the owner may live elsewhere than this layer.
        return linear(x, owner.dense(x.dtype).to(x.device))


def device_of(projection: Projection) -> torch.device:
    """Where a projection's tensors are."""
    device: torch.device = next(chain(projection.parameters(), projection.buffers())).device
    return device
