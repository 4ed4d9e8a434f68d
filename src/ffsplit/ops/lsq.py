"""Rounding to codes with gradients: learned step size quantization."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad


def rounded_weight(
    weight: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"], zero: Float[Tensor, "out groups"],
    *, bits: int, group: int,
) -> Float[Tensor, "out in"]:  # fmt: skip
    """``(code - zero) scale`` with ``code = clamp(round(weight / scale) + zero, 0, 2**bits - 1)``, differentiable.

    The gradient passes through the rounding as if it were not there. With ``v = weight / scale`` that of a weight is
    the result's where its code is not cut off and zero where it is; that of a scale is the sum over its group of the
    result's times ``round(v) - v``, or times ``code - zero`` where the code is cut off.

    Args:
        weight: float32.
        scale: of the columns of a group; not 0.
        zero: the code that means 0, a whole number.
        bits: of a code.
        group: consecutive columns that share a scale; the last group may be short.

    Nothing of the size of the weight is kept for the way back but the weight itself.

    Reference: Esser et al., LSQ, arXiv 1902.08153, equations 1 to 3; the offset is that of LSQ+, arXiv 2004.09576.
    """
    return _Rounded.apply(weight, scale, zero, bits, group)  # type: ignore[no-any-return, no-untyped-call]


def codes_of(
    weight: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"], zero: Float[Tensor, "out groups"],
    *, bits: int, group: int,
) -> Float[Tensor, "out in"]:  # fmt: skip
    """The codes of :func:`rounded_weight`, as floats."""
    columns = weight.shape[1]
    return (torch.round(weight / _each(scale, group, columns)) + _each(zero, group, columns)).clamp(0, 2**bits - 1)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int) -> Tensor:
        ctx.save_for_backward(weight, scale, zero)
        ctx.bits, ctx.group = bits, group
        codes = codes_of(weight, scale, zero, bits=bits, group=group)
        return (codes - _each(zero, group, weight.shape[1])) * _each(scale, group, weight.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        weight, scale, zero = ctx.saved_tensors
        columns = weight.shape[1]
        ratio, offset = weight / _each(scale, ctx.group, columns), _each(zero, ctx.group, columns)
        rounded = torch.round(ratio)
        inside = (rounded + offset >= 0) & (rounded + offset <= 2**ctx.bits - 1)
        end = (rounded + offset).clamp(0, 2**ctx.bits - 1) - offset
        each = gradient * torch.where(inside, rounded - ratio, end)
        return gradient * inside, _per_group(each, ctx.group), None, None, None


def _each(values: Float[Tensor, "out groups"], group: int, columns: int) -> Float[Tensor, "out in"]:
    return values.repeat_interleave(group, dim=1)[:, :columns]


def _per_group(values: Float[Tensor, "out in"], group: int) -> Float[Tensor, "out groups"]:
    filled = pad(values, (0, -values.shape[1] % group))
    return filled.view(len(values), -1, group).sum(-1)
