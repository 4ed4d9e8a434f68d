"""Many tokens through a sum in pieces, on CPUs in float32.

Between its products a sum makes tensors of tokens times neurons, a low-rank branch of all its neurons more of them than
a pruned FFN, one of codes those that are rounded besides. Those of a piece stay in the processor's cache, and in memory
that the process already has: large blocks are asked of the system anew every time, which clears every page of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ffsplit.ffn.projections import Dense, Int8Dynamic, LowRank, Packed, Projection
from ffsplit.kernels.cache import decoded_room
from ffsplit.kernels.dispatch import is_traced, takes_kernels

if TYPE_CHECKING:
    from ffsplit.ffn.merged import MergedCache
    from ffsplit.ffn.sum import Branch

MOST_TOKENS = 1024
"""Of a piece. Measured on two FFNs (384/1536 and 768/3072): half as many cost more in products than they save."""
TAKEN = (Dense, LowRank, Packed, Int8Dynamic)
"""Storages whose products are taken in pieces; others decode at every forward."""


def pays_in_pieces(
    x: Float[Tensor, "*tokens d_model"], branches: Sequence[Branch], linear: Projection | None, merged: MergedCache
) -> bool:
    """Whether these inputs go through a sum piece by piece: many tokens, float32, nothing recorded.

    Packed matrices must be kept decoded (in ``merged``), or have room to be: they would be decoded for every piece.
    """
    if is_traced():  # before any size is looked at, which would fix it
        return False
    if x.numel() <= MOST_TOKENS * x.shape[-1] or not x.is_cpu or x.dtype != torch.float32:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not takes_kernels(x, ()):
        return False
    if any(branch.selector is not None for branch in branches):
        return False
    projections = [p for branch in branches for p in (branch.up, branch.gate, branch.down) if p is not None]
    projections += [] if linear is None else [linear]
    if not all(type(p) in TAKEN for p in projections):
        return False
    packed = sum(p.spec.shape[0] * p.spec.shape[1] * x.itemsize for p in projections if type(p) is Packed)
    return not packed or merged.keeps_decoded or packed <= decoded_room(x.device)


def in_pieces(
    x: Float[Tensor, "*tokens d_model"], work: Callable[[Tensor], Tensor]
) -> Float[Tensor, "*tokens d_model"]:
    """``work`` on about equal pieces of the tokens, of :data:`MOST_TOKENS` at most."""
    tokens = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(tokens)
    count = -(-len(tokens) // MOST_TOKENS)
    for piece, place in zip(tokens.chunk(count), out.chunk(count), strict=True):
        place.copy_(work(piece))
    return out.view(x.shape)
