"""Norms without knowing their class: which parameter scales and which shifts is found by trying."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Affine:
    """A module that computes ``n(x) * (weight + offset) + bias``.

    Attributes:
        weight: name of the parameter.
        offset: 0, or 1 for the norms of Gemma.
        bias: name of the parameter, or None.
    """

    weight: str
    offset: int
    bias: str | None


class RefusedError(Exception):
    """Why one norm cannot be folded, or one FFN not be centred. Never escapes this room."""


def affine_of(module: nn.Module) -> Affine:
    """Which parameter of a norm scales and which shifts, found by trying.

    Raises:
        RefusedError: the module has no parameters, or is no function of this form.
    """
    own = dict(module.named_parameters(recurse=False))
    if not any(True for _ in module.parameters()):
        raise RefusedError("it has no weights to fold")
    sizes = {tuple(parameter.shape) for parameter in own.values()}
    refusal = RefusedError(f"{type(module).__name__} is not a norm times a weight plus a bias")
    if len(sizes) != 1 or len(own) != len(list(module.parameters())) or len(next(iter(sizes))) != 1:
        raise refusal
    size = next(iter(sizes))[0]
    probe = deepcopy(module).float().cpu()
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(0)) * 3 + 1

    def run(values: Mapping[str, Tensor | float]) -> Tensor:
        for name, parameter in probe.named_parameters():
            value = values.get(name, 0.0)
            parameter.copy_(value) if isinstance(value, Tensor) else parameter.fill_(value)
        result: Tensor = probe.forward(x.unsqueeze(0))[0]  # not the call, which would run the model's hooks
        return result

    base = run({})
    moved = {name: run({name: 1.0}) - base for name in own}
    shifts = [name for name, difference in moved.items() if _close(difference, torch.ones_like(x))]
    scales = [name for name in own if name not in shifts]
    if len(scales) != 1 or len(shifts) > 1:
        raise refusal
    found = Affine(scales[0], int(not _close(base, torch.zeros_like(x))), shifts[0] if shifts else None)
    scale, shift = scale_and_shift(module, found)
    actual = run({name: parameter.float().cpu() for name, parameter in own.items()})
    expected = moved[found.weight] * scale.float().cpu()
    if not _close(actual, expected if shift is None else expected + shift.float().cpu()):
        raise refusal
    return found


def scale_and_shift(module: nn.Module, affine: Affine) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"] | None]:
    """The factor and the summand that a norm applies, float64."""
    scale = module.get_parameter(affine.weight).detach().double() + affine.offset
    return scale, None if affine.bias is None else module.get_parameter(affine.bias).detach().double()


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)
