"""The whole FFN in float8 for many tokens on NVIDIA GPUs; opt-in, since it rounds activations.

The decoded weights, gate and up stacked, are kept as float8 with a scale a row (one byte a weight, beside the stored
codes); inputs and hidden activations are rounded per token, the latter in the pass that computes them. Products are of
codes alone, which is faster than with a scale for every row and column; these are applied in the passes behind them.

Reference: FP8 Formats for Deep Learning, arXiv 2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ffsplit.kernels import nvrtc
from ffsplit.kernels.activations import NAMES
from ffsplit.kernels.dense_ffn import DenseFFN
from ffsplit.kernels.float8 import ALIGNMENT, FLOAT8, FLOAT8_CORES, round_rows
from ffsplit.kernels.low_bit import aligned

Prefill = Literal["exact", "float8"]
THREADS, STEP = 512, 2048
"""Of a block that rounds a row, and columns that it deals with at a time."""
MOST_COLUMNS = 32 * STEP
"""Of a row, which a block has in its registers."""
VALUE_THREADS, VALUE_COLUMNS = 256, 1024
"""Of a block that makes values of sums, and its columns."""


class _Mode:
    """Of this process."""

    prefill: Prefill = "exact"


def set_prefill(how: Prefill) -> None:
    """How FFNs of low-bit branches work on many tokens (more than 32) on GPUs.

    Args:
        how: ``"exact"``: by the decoded weights, in the dtype of the model, at the speed of the dense model;
            ``"float8"``: weights and activations rounded to float8 (e4m3), faster than the dense model, at the price of
            a byte a weight beside the stored codes and of the rounding, for FFNs of up to 65,536 neurons. docs/speed.md
            tells what both cost.

    Raises:
        ValueError: it is neither.
    """
    if how not in get_args(Prefill):
        raise ValueError(f"prefill={how!r}: must be one of {', '.join(get_args(Prefill))}")
    _Mode.prefill = how


@dataclass(frozen=True)
class Float8FFN:
    """A dense FFN whose weights are float8 with a scale a row, float32.

    Attributes:
        ffn: codes in the places of weights.
        inner_scale: ``[rows]``.
        down_scale: ``[d_model]``.
        one: the scale that torch's product of codes is given.
    """

    ffn: DenseFFN
    inner_scale: Tensor
    down_scale: Tensor
    one: Tensor


def float8_ffn(ffn: DenseFFN) -> Float8FFN:
    """Round the weights of a dense FFN, row by row."""
    inner, inner_scale = round_rows(ffn.inner)
    down, down_scale = round_rows(ffn.down)
    bias = None if ffn.bias is None else aligned(ffn.bias)
    codes = replace(ffn, inner=inner.view(FLOAT8), down=down.view(FLOAT8), bias=bias)
    return Float8FFN(codes, inner_scale.flatten(), down_scale.flatten(), inner_scale.new_ones(1))


def wants_float8(x: Float[Tensor, "*tokens d_model"], d_ff: int) -> bool:
    """Whether it was asked for, and the GPU and the shapes allow it; the call itself is one that may run kernels."""
    if _Mode.prefill != "float8" or x.device.type != "cuda" or x.dtype != torch.bfloat16:
        return False
    device = x.device.index or 0
    whole = d_ff % ALIGNMENT == 0 and x.shape[-1] % ALIGNMENT == 0
    fits = max(d_ff, x.shape[-1]) <= MOST_COLUMNS
    return whole and fits and nvrtc.is_supported(device) and torch.cuda.get_device_capability(device) >= FLOAT8_CORES


@dataclass(frozen=True)
class Rows:
    """Float8 rows and their scales, ``[tokens, columns]`` and ``[tokens]``."""

    codes: Tensor
    scale: Tensor


def run_float8(x: Float[Tensor, "*tokens d_model"], made: Float8FFN) -> Tensor | None:
    """The outputs, or None where the kernels cannot be compiled."""
    ffn = made.ffn
    inputs = rounded(x.reshape(-1, x.shape[-1]).contiguous(), x.shape[-1])
    if inputs is None:
        return None
    sums = _product(inputs, ffn.inner, made.one)
    hidden = rounded(sums, ffn.d_ff, ffn, inputs.scale, made.inner_scale)
    if hidden is None:
        return None
    out = _product(hidden, ffn.down, made.one)
    kernel = nvrtc.launcher("float8_rows", "float8_values", (x.dtype == torch.float16,), x.device.index or 0)
    if kernel is None:
        return None
    grid = out.shape[0], -(-out.shape[1] // VALUE_COLUMNS)
    pointers = nvrtc.addresses((out, hidden.scale, made.down_scale, ffn.bias))
    kernel(grid, VALUE_THREADS, pointers, [out.shape[1]])
    return out.view(x.shape)


def _product(rows: Rows, weight: Tensor, one: Tensor) -> Tensor:
    """Sums of products of codes, in bfloat16, whose exponents have room for them."""
    found: Tensor = torch._scaled_mm(
        rows.codes, weight.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return found


def rounded(
    x: Tensor,
    columns: int,
    ffn: DenseFFN | None = None,
    scale: Tensor | None = None,
    columns_scale: Tensor | None = None,
) -> Rows | None:
    """Rows as float8; None where the kernel cannot be compiled.

    Args:
        x: ``[tokens, columns]``; of a gated FFN that of ``up``, then that of ``gate``.
        columns: of the result.
        ffn: whose activation and biases come first; None takes rows as they are.
        scale: of each row, where these are sums of products of codes.
        columns_scale: of each of their columns.
    """
    act, gated = ("identity", False) if ffn is None else (ffn.act, ffn.gated)
    steps = -(-columns // STEP)
    arguments = NAMES.index(act), gated, x.dtype == torch.float16, scale is not None, steps
    kernel = nvrtc.launcher("float8_rows", "float8_rows", arguments, x.device.index or 0)
    if kernel is None:
        return None
    found = Rows(
        torch.empty(x.shape[0], columns, dtype=FLOAT8, device=x.device),
        torch.empty(x.shape[0], dtype=torch.float32, device=x.device),
    )
    biases = (None, None) if ffn is None else (ffn.up_bias, ffn.gate_bias)
    pointers = nvrtc.addresses((x, scale, columns_scale, found.codes, found.scale, *biases))
    kernel((x.shape[0], 1), THREADS, pointers, [columns])
    return found
