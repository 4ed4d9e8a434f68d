"""The whole FFN in float8 for many tokens on NVIDIA GPUs; opt-in, since it rounds activations.

The decoded weights, gate and up stacked, are kept as float8 with a scale a row (one byte a weight, beside the stored
codes); inputs and hidden activations are rounded per token, the latter in the pass that computes them.

Reference: FP8 Formats for Deep Learning, arXiv 2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ffsplit.kernels import nvrtc
from ffsplit.kernels.dense_ffn import DenseFFN
from ffsplit.kernels.float8 import ALIGNMENT, FLOAT8, FLOAT8_CORES, round_rows
from ffsplit.kernels.low_bit import NAMES

Prefill = Literal["exact", "float8"]
THREADS = 512


class _Mode:
    """Of this process."""

    prefill: Prefill = "exact"


def set_prefill(how: Prefill) -> None:
    """How FFNs of low-bit branches work on many tokens (more than 32) on GPUs.

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
    """A dense FFN whose weights are float8 with a scale a row, float32: ``[1, rows]`` and ``[1, d_model]``."""

    ffn: DenseFFN
    inner_scale: Tensor
    down_scale: Tensor


def float8_ffn(ffn: DenseFFN) -> Float8FFN:
    """Round the weights of a dense FFN, row by row."""
    inner, inner_scale = round_rows(ffn.inner)
    down, down_scale = round_rows(ffn.down)
    rounded = replace(ffn, inner=inner.view(FLOAT8), down=down.view(FLOAT8))
    return Float8FFN(rounded, inner_scale.T.contiguous(), down_scale.T.contiguous())


def wants_float8(x: Float[Tensor, "*tokens d_model"], d_ff: int) -> bool:
    """Whether it was asked for, and the GPU and the shapes allow it; the call itself is one that may run kernels."""
    if _Mode.prefill != "float8" or x.device.type != "cuda" or x.dtype != torch.bfloat16:
        return False
    device = x.device.index or 0
    aligned = d_ff % ALIGNMENT == 0 and x.shape[-1] % ALIGNMENT == 0
    return aligned and nvrtc.is_supported(device) and torch.cuda.get_device_capability(device) >= FLOAT8_CORES


def run_float8(x: Float[Tensor, "*tokens d_model"], made: Float8FFN) -> Tensor | None:
    """The outputs, or None where the kernels cannot be compiled."""
    ffn = made.ffn
    rounded = _rounded(x.reshape(-1, x.shape[-1]).contiguous(), x.shape[-1], "identity", False, None, None)
    if rounded is None:
        return None
    hidden = _product(rounded, ffn.inner, made.inner_scale)
    activated = _rounded(hidden, ffn.d_ff, ffn.act, ffn.gated, ffn.up_bias, ffn.gate_bias)
    if activated is None:
        return None
    out = _product(activated, ffn.down, made.down_scale)
    return (out if ffn.bias is None else out + ffn.bias).view(x.shape)


def _product(rows: tuple[Tensor, Tensor], weight: Tensor, scale: Tensor) -> Tensor:
    """``x W^T`` in bfloat16 of float8 rows and their scales."""
    found: Tensor = torch._scaled_mm(
        rows[0], weight.T, scale_a=rows[1], scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return found


def _rounded(
    x: Tensor, columns: int, act: str, gated: bool, up_bias: Tensor | None, gate_bias: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Rows, activated and rounded, and their scales."""
    arguments = NAMES.index(act), gated, x.dtype == torch.float16
    kernel = nvrtc.launcher("float8_rows", "float8_rows", arguments, x.device.index or 0)
    if kernel is None:
        return None
    out = torch.empty(x.shape[0], columns, dtype=FLOAT8, device=x.device)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    biases = [0 if bias is None else bias.data_ptr() for bias in (up_bias, gate_bias)]
    kernel((x.shape[0], 1), THREADS, [x.data_ptr(), out.data_ptr(), scale.data_ptr(), *biases], [columns])
    return out, scale
