"""Products with float8 (e4m3) weights: decoded and multiplied anywhere, on float8 tensor cores where torch has them."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import linear

from ffsplit.kernels.straight_through import with_gradient_of

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
FLOAT8_CORES = (9, 0)
"""Compute capability from which torch multiplies float8 with a scale a row."""
ALIGNMENT = 16


def round_rows(
    x: Float[Tensor, "rows columns"], scale: Float[Tensor, "rows 1"] | None = None
) -> tuple[UInt8[Tensor, "rows columns"], Float[Tensor, "rows 1"]]:
    """The nearest float8 of every value over its row's scale, as bit patterns, and the scales, float32.

    Args:
        x: any float dtype.
        scale: given already; None is the one at which the largest value of the row becomes 448, the largest float8,
            but no smaller than a normal float32.

    Reference: FP8 Formats for Deep Learning, arXiv 2209.05433.
    """
    wide = x.float()
    if scale is None:
        largest = wide.abs().amax(1, keepdim=True) if x.shape[1] else wide.new_zeros(x.shape[0], 1)
        scale = torch.where(largest == 0, 1.0, (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny))
    # Clamped first: whether a cast saturates or gives NaN is not the same everywhere.
    return (wide / scale).clamp(-LARGEST, LARGEST).to(FLOAT8).view(torch.uint8), scale


def decode(
    codes: UInt8[Tensor, "rows columns"], scale: Float[Tensor, "rows 1"], dtype: torch.dtype
) -> Float[Tensor, "rows columns"]:
    """The values of bit patterns, computed in float32 (float64 if asked for)."""
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.view(FLOAT8).to(torch.float32).to(wide) * scale.to(wide)).to(dtype)


def float8_linear(
    x: Float[Tensor, "*tokens columns"],
    codes: UInt8[Tensor, "out columns"],
    scale: Float[Tensor, "out 1"],
    *,
    activations: bool,
) -> Float[Tensor, "*tokens out"]:
    """``x W^T``; with ``activations``, ``x`` is rounded to float8 per token and has the plain product's gradient."""
    if not activations:
        return linear(x, decode(codes, scale, x.dtype))
    flat = x.detach().reshape(-1, x.shape[-1])
    rounded, x_scale = round_rows(flat)
    if _has_float8_cores(flat, codes):
        sums = torch._scaled_mm(
            rounded.view(FLOAT8),
            codes.view(FLOAT8).T,
            scale_a=x_scale,
            scale_b=scale.float().T.contiguous(),
            out_dtype=x.dtype,
        )
    else:
        wide = torch.promote_types(x.dtype, torch.float32)
        sums = linear(decode(rounded, x_scale, wide), decode(codes, scale, wide)).to(x.dtype)
    found = sums.view(*x.shape[:-1], codes.shape[0])
    return with_gradient_of(found, x, lambda: decode(codes, scale, x.dtype))


def _has_float8_cores(x: Tensor, codes: Tensor) -> bool:
    """Whether torch's float8 kernel takes these tensors."""
    if x.device.type != "cuda" or torch.version.hip is not None or x.dtype != torch.bfloat16 or not x.numel():
        return False
    if codes.shape[0] % ALIGNMENT or codes.shape[1] % ALIGNMENT:
        return False
    capability: tuple[int, int] = torch.get_device_module(x.device).get_device_capability(x.device)
    return capability >= FLOAT8_CORES
