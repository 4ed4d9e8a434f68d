"""Training the scales of packed low-bit matrices while their codes stay."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from ffsplit.ffn.projections import Packed, Projection


class TrainedScales(Projection):
    """A packed matrix whose scales are multiplied by factors: one a group, or one a row where scales have 8 bits."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.spec = packed.spec
        self.packed = packed
        groups = 1 if packed.row_scale is not None else packed.spec.groups
        self.factor = nn.Parameter(torch.ones(packed.spec.shape[0], groups, device=packed.codes.device))

    @classmethod
    def empty(cls, spec: object, dtype: torch.dtype, device: torch.device) -> TrainedScales:
        return cls(Packed.empty(spec, dtype, device))  # type: ignore[arg-type]

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        weight = self.packed.dense(torch.float32)
        each = self.spec.shape[1] if self.factor.shape[1] == 1 else self.spec.group
        factors = self.factor.repeat_interleave(each, dim=1)[:, : self.spec.shape[1]]
        return (weight * factors).to(dtype or torch.float32)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return linear(x, self.dense(x.dtype))

    @torch.no_grad()
    def finished(self) -> Packed:
        """The packed matrix with the trained scales, rounded to the float16 that is stored."""
        stored = self.packed.scale if self.packed.row_scale is None else self.packed.row_scale
        scale = stored.view(torch.float16).float()
        factor = self.factor if scale.dim() == 2 else self.factor.squeeze(1)
        limit = torch.finfo(torch.float16).max
        stored.copy_((scale * factor).clamp(-limit, limit).half().view(torch.int16))
        return self.packed
