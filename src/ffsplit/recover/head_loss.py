"""A loss on logits that never exist as a whole: the output head and its gradient, some tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

ChunkLoss = Callable[[Tensor, slice], Tensor]
"""From logits ``[tokens, vocab]`` and which tokens these are to a sum over them."""


def through_head(
    states: Float[Tensor, "tokens d_model"],
    weight: Float[Tensor, "vocab d_model"],
    bias: Float[Tensor, " vocab"] | None,
    loss: ChunkLoss,
    size: int,
) -> Float[Tensor, ""]:
    """``sum over chunks loss(states weight^T + bias)``, with ``size`` tokens' logits in memory at a time.

    Gradients of each chunk are taken while its logits are there, so nothing is computed twice.

    Args:
        states: last hidden states.
        weight: of the head.
        bias: of the head.
        loss: of a chunk.
        size: tokens of a chunk.
    """
    if not torch.is_grad_enabled():
        parts = [loss(linear(states[rows], weight, bias), rows) for rows in _slices(len(states), size)]
        return torch.stack(parts).sum() if parts else states.sum() * 0
    return _ThroughHead.apply(states, weight, bias, loss, size)  # type: ignore[no-any-return,no-untyped-call]


class _ThroughHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, loss: ChunkLoss, size: int) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        leaves = [None if tensor is None else tensor.detach() for tensor in (states, weight, bias)]
        sums: list[Tensor | None] = [
            torch.zeros_like(leaf) if leaf is not None and needed else None
            for leaf, needed in zip(leaves, wanted, strict=True)
        ]
        total = torch.zeros((), device=states.device)
        for rows in _slices(len(states), size):
            value, grads = _chunk(leaves, sums, rows, loss)
            total += value
            for place, grad in grads:
                target = sums[place]
                assert target is not None
                (target[rows] if place == 0 else target).add_(grad)
        ctx.save_for_backward(*sums)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if found is None else found * grad for found in ctx.saved_tensors), None, None)


def _chunk(
    leaves: list[Tensor | None], sums: list[Tensor | None], rows: slice, loss: ChunkLoss
) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """The loss of one chunk and its gradients, by the place of what they belong to."""
    states, weight, bias = leaves
    assert states is not None
    assert weight is not None
    with torch.enable_grad():
        parts = [states[rows], weight, bias]
        used = [
            None if part is None else part.detach().requires_grad_(found is not None)
            for part, found in zip(parts, sums, strict=True)
        ]
        assert used[0] is not None
        assert used[1] is not None
        value = loss(linear(used[0], used[1], used[2]), rows)
        places = [place for place, found in enumerate(sums) if found is not None]
        needed = [leaf for leaf, found in zip(used, sums, strict=True) if leaf is not None and found is not None]
        grads = torch.autograd.grad(value, needed)
    return value.detach().float(), list(zip(places, grads, strict=True))


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]
