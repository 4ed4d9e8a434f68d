"""The whole FFN in float8 for many tokens on NVIDIA GPUs; opt-in, since it rounds activations.

The decoded weights, gate and up stacked, are kept as float8 with a scale a row (one byte a weight, beside the stored
codes); inputs and hidden activations are rounded per token, the latter in the pass that computes them.

Reference: FP8 Formats for Deep Learning, arXiv 2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ffsplit.kernels import nvrtc
from ffsplit.kernels.float8 import ALIGNMENT, FLOAT8, FLOAT8_CORES, round_rows
from ffsplit.kernels.low_bit import ACTIVATIONS

Prefill = Literal["exact", "float8"]
THREADS = 512


class _Mode:
    """Of this process."""

    prefill: Prefill = "exact"


def set_prefill(how: Prefill) -> None:
    """How FFNs of low-bit branches work on many tokens (more than 64) on GPUs.

    Args:
        how: ``"exact"``: by the decoded weights, in the dtype of the model, at the speed of the dense model;
            ``"float8"``: weights and activations rounded to float8 (e4m3), faster than the dense model, at the price of
            a byte a weight beside the stored codes and of the rounding. docs/speed.md tells what both cost.

    Raises:
        ValueError: it is neither.
    """
    if how not in get_args(Prefill):
        raise ValueError(f"prefill={how!r}: must be one of {', '.join(get_args(Prefill))}")
    _Mode.prefill = how


@dataclass(frozen=True)
class Float8FFN:
    """Weights of a dense FFN as float8 with a scale a row.

    Attributes:
        inner: ``[up; gate]``, or ``up``: ``[rows, d_model]``.
        inner_scale: ``[1, rows]``, float32.
        down: ``[d_model, d_ff]``.
        down_scale: ``[1, d_model]``, float32.
        up_bias: ``[d_ff]``; likewise ``gate_bias``.
        bias: ``[d_model]``, of the output.
        act: one of :data:`ffsplit.kernels.low_bit.ACTIVATIONS`.
    """

    inner: Tensor
    inner_scale: Tensor
    down: Tensor
    down_scale: Tensor
    up_bias: Tensor | None
    gate_bias: Tensor | None
    bias: Tensor | None
    act: str

    @property
    def d_ff(self) -> int:
        return self.down.shape[1]

    @property
    def gated(self) -> bool:
        return self.inner.shape[0] != self.d_ff


def float8_ffn(
    up: Float[Tensor, "d_ff d_model"],
    down: Float[Tensor, "d_model d_ff"],
    act: str,
    *,
    gate: Float[Tensor, "d_ff d_model"] | None = None,
    up_bias: Float[Tensor, " d_ff"] | None = None,
    gate_bias: Float[Tensor, " d_ff"] | None = None,
    bias: Float[Tensor, " d_model"] | None = None,
) -> Float8FFN:
    """Round the weights of a dense FFN, row by row."""
    inner, inner_scale = round_rows(up if gate is None else torch.cat([up, gate]))
    outer, outer_scale = round_rows(down)
    return Float8FFN(
        inner.view(FLOAT8),
        inner_scale.T.contiguous(),
        outer.view(FLOAT8),
        outer_scale.T.contiguous(),
        up_bias,
        gate_bias,
        bias,
        act,
    )


def wants_float8(x: Float[Tensor, "*tokens d_model"], d_ff: int) -> bool:
    """Whether it was asked for, and the GPU and the shapes allow it."""
    if _Mode.prefill != "float8" or x.device.type != "cuda" or x.dtype != torch.bfloat16:
        return False
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        return False
    device = x.device.index or 0
    aligned = d_ff % ALIGNMENT == 0 and x.shape[-1] % ALIGNMENT == 0
    return aligned and nvrtc.is_supported(device) and torch.cuda.get_device_capability(device) >= FLOAT8_CORES


def run_float8(x: Float[Tensor, "*tokens d_model"], ffn: Float8FFN) -> Tensor | None:
    """The outputs, or None where the kernels cannot be compiled."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    rounded = _rounded(flat, flat.shape[1], "identity", False, None, None)
    if rounded is None:
        return None
    hidden = torch._scaled_mm(
        rounded[0], ffn.inner.T, scale_a=rounded[1], scale_b=ffn.inner_scale, out_dtype=x.dtype, use_fast_accum=True
    )
    activated = _rounded(hidden, ffn.d_ff, ffn.act, ffn.gated, ffn.up_bias, ffn.gate_bias)
    if activated is None:
        return None
    out = torch._scaled_mm(
        activated[0], ffn.down.T, scale_a=activated[1], scale_b=ffn.down_scale, out_dtype=x.dtype, use_fast_accum=True
    )
    return (out if ffn.bias is None else out + ffn.bias).view(x.shape)


def _rounded(
    x: Tensor, columns: int, act: str, gated: bool, up_bias: Tensor | None, gate_bias: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Rows, activated and rounded, and their scales."""
    flags = f"{ACTIVATIONS.index(act)},{str(gated).lower()},{str(x.dtype == torch.float16).lower()}"
    kernel = nvrtc.kernel("float8_rows", f"float8_rows<{flags}>", x.device.index or 0)
    if kernel is None:
        return None
    out = torch.empty(x.shape[0], columns, dtype=FLOAT8, device=x.device)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    nothing = x.new_empty(0)
    biases = [nothing if bias is None else bias for bias in (up_bias, gate_bias)]
    kernel(grid=(x.shape[0], 1, 1), block=(THREADS, 1, 1), args=[x, out, scale, *biases, columns])
    return out, scale
