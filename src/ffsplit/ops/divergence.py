"""How far apart two models' answers are, one number a token."""

from __future__ import annotations

from math import pi

import torch
from jaxtyping import Float
from torch import Tensor


def kl_divergence(
    reference: Float[Tensor, "tokens vocab"], other: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    """KL(reference || other) per token in nats, from logits; a token of zero probability adds nothing."""
    log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
    return _expected(log_p, log_p - log_q).clamp_min(0.0)


def js_divergence(
    reference: Float[Tensor, "tokens vocab"], other: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    """Jensen-Shannon divergence per token in nats, from logits: symmetric, at most ``log 2``."""
    log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
    middle = torch.logaddexp(log_p, log_q) - torch.log(torch.full((), 2.0, dtype=log_p.dtype, device=log_p.device))
    return ((_expected(log_p, log_p - middle) + _expected(log_q, log_q - middle)) / 2).clamp_min(0.0)


def angular_distance(
    reference: Float[Tensor, "tokens d"], other: Float[Tensor, "tokens d"]
) -> Float[Tensor, " tokens"]:
    """The angle between two vectors per token, as a share of half a turn: 0 is the same direction, 1 the opposite."""
    cosine = torch.cosine_similarity(reference, other, dim=-1)
    return torch.arccos(cosine.clamp(-1.0, 1.0)) / pi


def relative_distance(
    reference: Float[Tensor, "tokens d"], other: Float[Tensor, "tokens d"]
) -> Float[Tensor, " tokens"]:
    """``||other - reference||^2 / ||reference||^2`` per token; the reference's smallest positive number guards zero."""
    tiny = torch.finfo(reference.dtype).tiny
    return (other - reference).square().sum(-1) / reference.square().sum(-1).clamp_min(tiny)


def _expected(log_p: Float[Tensor, "tokens vocab"], value: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """``sum p * value``; a logit of -inf (a masked-out entry) has no part in it, where ``0 * nan`` would be nan."""
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * value).sum(-1)
