"""How much a module's update changes the residual stream, one number a token: what decides which FFN may go."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def cosine_distance(without: Float[Tensor, "tokens d"], with_it: Float[Tensor, "tokens d"]) -> Float[Tensor, " tokens"]:
    """``1 - cos(r, r + F)`` per token, float64; 0 where the update leaves the stream as it is.

    Args:
        without: the residual stream ``r``.
        with_it: ``r + F``.

    Reference: LLM-Drop, arXiv 2406.15786 (a sub-layer's input against input plus output); ShortGPT, arXiv 2403.03853,
        block influence (a block's input against its output).
    """
    before, after = without.double(), with_it.double()
    tiny = torch.finfo(torch.float64).tiny
    norms = before.norm(dim=-1) * after.norm(dim=-1)
    cosine = (before * after).sum(-1) / norms.clamp_min(tiny)
    still = (before == after).all(dim=-1)
    return torch.where(still, 0.0, 1.0 - cosine.clamp(-1.0, 1.0))


def relative_update(
    without: Float[Tensor, "tokens d"], with_it: Float[Tensor, "tokens d"], order: int
) -> Float[Tensor, " tokens"]:
    """``||F||_p / ||r||_p`` per token, float64, with ``p = order``; the smallest positive number guards ``r = 0``.

    Reference: relative L1 and L2 of 2407.16286; for ``p = 2`` also the function norm of 2010.01791 (SNIP).
    """
    before, after = without.double(), with_it.double()
    size: Tensor = torch.linalg.vector_norm(after - before, ord=order, dim=-1)
    stream: Tensor = torch.linalg.vector_norm(before, ord=order, dim=-1)
    return size / stream.clamp_min(torch.finfo(torch.float64).tiny)
