"""How well a language model predicts a text."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy


def next_token_losses(
    logits: Float[Tensor, "batch tokens vocab"], ids: Int[Tensor, "batch tokens"], real: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, " batch"]:
    """Mean negative log-likelihood of every sequence's next tokens, in nats.

    Args:
        logits: after each token.
        ids: the tokens.
        real: False for padding, which is neither predicted nor predicted from; a sequence of one token has loss 0.
    """
    nll = cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:].long(), reduction="none")
    counted = (real[:, 1:] & real[:, :-1]).to(nll.dtype)
    return (nll * counted).sum(1) / counted.sum(1).clamp_min(1)
