"""Gradients for forwards that round their inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear


def with_gradient_of(
    found: Float[Tensor, "*tokens out"], x: Float[Tensor, "*tokens columns"], weight: Callable[[], Tensor]
) -> Float[Tensor, "*tokens out"]:
    """The values found, with the gradient that ``x W^T`` has for ``x``.

    Rounding is flat almost everywhere, so its own gradient would be zero. The plain product, which is only computed if
    there is to be a gradient, adds zero to the values.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return found
    plain = linear(x, weight().to(x.dtype))
    return found + (plain - plain.detach())
