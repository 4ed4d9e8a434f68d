"""Products of int8 matrices: activations rounded per token at run time, weights beforehand.

Sums of int8 products are exact in int32 (up to 133,000 columns), so every path gives the same numbers up to the last
bits of a float32, but for inputs next to the middle between two codes, which CPUs' kernels may round the other way.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor
from torch.nn.functional import pad

from ffsplit.kernels import cpu_int8
from ffsplit.kernels.cache import DerivedCache
from ffsplit.kernels.dispatch import cpu_int8_takes
from ffsplit.kernels.straight_through import with_gradient_of

FEW_KEY = "cpu_int8_few"
"""Of what is kept for few tokens on CPUs."""
LARGEST = 127
"""Codes are symmetric; -128 is not used."""
INTEGER_CORES = ("cpu", "cuda")
LEAST_ROWS = 32
"""CUDA's kernel wants more than 16 rows; and rows, columns and outputs in multiples of 8."""
ALIGNMENT = 8


def round_rows(
    x: Float[Tensor, "rows columns"], scale: Float[Tensor, "rows 1"] | None = None
) -> tuple[Int8[Tensor, "rows columns"], Float[Tensor, "rows 1"]]:
    """The nearest codes of every row, and the rows' scales.

    Args:
        x: any float dtype; worked on in float32, or float64 if it is.
        scale: given already; None is the one at which the largest value of the row becomes 127, but no smaller than a
            normal number.

    Returns:
        Codes from -127 to 127 and scales > 0; a row with Inf or NaN has such a scale, which reaches the output.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if scale is None:
        largest = wide.abs().amax(1, keepdim=True) if x.shape[1] else wide.new_zeros(x.shape[0], 1)
        scale = torch.where(largest == 0, 1.0, (largest / LARGEST).clamp_min(torch.finfo(wide.dtype).tiny))
    codes = (wide / scale).round_().clamp_(-LARGEST, LARGEST).nan_to_num_(0.0).to(torch.int8)
    return codes, scale


def exact_product(a: Int8[Tensor, "rows columns"], b: Int8[Tensor, "out columns"]) -> Int[Tensor, "rows out"]:
    """``a b^T`` in int32 by way of float64, which holds every such sum: the reference, and what other devices run."""
    return (a.double() @ b.double().T).to(torch.int32)


def product(a: Int8[Tensor, "rows columns"], b: Int8[Tensor, "out columns"]) -> Int[Tensor, "rows out"]:
    """``a b^T`` in int32, on integer cores where torch has a kernel, padded to the sizes that it takes."""
    if a.device.type not in INTEGER_CORES or not b.shape[1]:
        return exact_product(a, b)
    rows, outputs = a.shape[0], b.shape[0]
    more, longer = (max(LEAST_ROWS - rows, 0), -outputs % ALIGNMENT) if a.device.type == "cuda" else (0, 0)
    # On CPUs too: with one column torch 2.13 returns memory that it has not written.
    wider = -a.shape[1] % ALIGNMENT
    found: Tensor = torch._int_mm(_padded(a, more, wider), _padded(b, longer, wider).T)
    return found[:rows, :outputs]


def _padded(matrix: Int8[Tensor, "rows columns"], more: int, wider: int) -> Int8[Tensor, "more_rows more_columns"]:
    """With zeros, which add nothing; the matrix itself, not a copy, where none are needed."""
    return pad(matrix, (0, wider, 0, more)) if more or wider else matrix.contiguous()


def int8_linear(
    x: Float[Tensor, "*tokens columns"],
    codes: Int8[Tensor, "out columns"],
    scale_bits: Int[Tensor, " out"],
    cache: DerivedCache,
) -> Float[Tensor, "*tokens out"]:
    """``x W^T`` with ``x`` rounded to int8 per token; the gradient of ``x`` is that of the unrounded product.

    On CPUs with kernels for it, copies of the codes in their orders are kept: a byte a weight for few tokens, and one
    for many.

    Args:
        x: inputs.
        codes: of the weights.
        scale_bits: of each row, float16 as int16 bit patterns.
        cache: of this matrix.
    """
    flat = x.detach().reshape(-1, x.shape[-1])
    scale = scale_bits.view(torch.float16)
    if cpu_int8_takes(x, codes):
        found = _on_cpu(flat, codes, scale_bits, cache)
    else:
        rounded, x_scale = round_rows(flat)
        found = (product(rounded, codes).to(x_scale) * scale.to(x_scale)).mul_(x_scale)
    found = found.to(x.dtype).view(*x.shape[:-1], codes.shape[0])
    wide = torch.promote_types(x.dtype, torch.float32)
    return with_gradient_of(found, x, lambda: codes.to(wide) * scale.to(wide)[:, None])


def _on_cpu(
    x: Float[Tensor, "tokens columns"], codes: Int8[Tensor, "out columns"], scale_bits: Tensor, cache: DerivedCache
) -> Float[Tensor, "tokens out"]:
    """In float32, by the kernel that is the faster one for so many tokens."""
    sources, scale = (codes, scale_bits), scale_bits.view(torch.float16)
    if cpu_int8.takes_few(x.shape[0]):
        few = cache.get(FEW_KEY, sources, lambda: cpu_int8.few_int8_matrix([cpu_int8.Int8Parts(codes, scale)]))
        return cpu_int8.few_product(x, few)
    made = cache.get("cpu_int8", sources, lambda: cpu_int8.int8_matrix(codes, scale))
    moved, x_scale = cpu_int8.round_rows(x)
    return cpu_int8.product(moved, made).mul_(x_scale)
