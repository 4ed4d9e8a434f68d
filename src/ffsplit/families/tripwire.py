"""What stays in the place of ``down``, so that a checkpoint can never be loaded without this package."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Tripwire(nn.Module):
    """Identity that stores an empty tensor ``weight`` of shape ``[d_model, 0]``.

    The tensor keeps the name of the original ``down`` weight with a shape that no model has. transformers refuses to
    load a tensor of the wrong shape, where it would only warn about a missing one and leave it random.
    """

    weight: Tensor

    def __init__(
        self, d_model: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        # A buffer: an empty parameter would be handed to optimisers and to accelerate's disk offload, which fails.
        # Host modules may read its dtype, so it is that of the weight it stands for.
        self.register_buffer("weight", torch.empty(d_model, 0, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return f"d_model={self.weight.shape[0]}"
