"""The forward of a block-diagonal matrix: one batched product."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad


def block_diagonal(
    x: Float[Tensor, "*tokens in"], weight: Float[Tensor, "blocks rows width"]
) -> Float[Tensor, "*tokens blocks rows"]:
    """``x blkdiag(weight)^T``, the outputs of every block apart.

    Args:
        x: at most ``blocks * width`` columns; fewer are filled up with zeros, so what ``weight`` holds there is without
            effect.
        weight: the blocks, torch layout.
    """
    blocks, _, width = weight.shape
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    missing = blocks * width - x.shape[-1]
    if missing:
        rows = pad(rows, (0, missing))
    inputs = rows.reshape(rows.shape[0], blocks, width).transpose(0, 1)
    outputs = torch.bmm(inputs, weight.transpose(1, 2)).transpose(0, 1)
    return outputs.reshape(*x.shape[:-1], *outputs.shape[1:])
