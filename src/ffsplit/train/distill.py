"""Losses that pull a student to its teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, mse_loss


def logits_loss(
    student: Float[Tensor, "*rows classes"], teacher: Float[Tensor, "*rows classes"], temperature: float = 2.0
) -> Float[Tensor, ""]:
    """``T^2 KL(teacher / T || student / T)``, the mean over rows, in nats; for one output the mean squared difference.

    Reference: Hinton et al., arXiv 1503.02531, section 2. The square keeps the gradient's size independent of T.
    """
    if student.shape[-1] == 1:
        return mse_loss(student.float(), teacher.float())
    classes = student.shape[-1]
    first = log_softmax(student.float().reshape(-1, classes) / temperature, dim=-1)
    second = log_softmax(teacher.float().reshape(-1, classes) / temperature, dim=-1)
    return temperature**2 * kl_div(first, second, log_target=True, reduction="batchmean")


def hidden_loss(
    student: Sequence[Float[Tensor, "batch seq_len d_model"]],
    teacher: Sequence[Float[Tensor, "batch seq_len d_model"]],
    mask: Int[Tensor, "batch seq_len"],
) -> Float[Tensor, ""]:
    """Squared difference of the hidden states on real tokens, relative to the teacher's variance; mean over layers."""
    weight = mask.unsqueeze(-1).to(torch.float32)
    total = torch.zeros((), device=mask.device)
    for own, other in zip(student, teacher, strict=True):
        wanted = other.float()
        count = weight.sum() * wanted.shape[-1]
        mean = (wanted * weight).sum() / count
        variance = ((wanted - mean).square() * weight).sum() / count
        total = total + ((own.float() - wanted).square() * weight).sum() / count / variance.clamp_min(1e-12)
    return total / len(student)
