"""Int8 products on CPUs with integer dot products (VNNI), through torch's bindings, weights reordered once.

Few tokens go to fbgemm's kernel, which rounds, multiplies and scales in one call; many to oneDNN's, which is the faster
one there. Both add in int32, so the numbers are the same up to the last bits of a float32, but for inputs next to the
middle between two codes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from ffsplit.kernels import cpu

MOST_COLUMNS = 65_000
"""Sums of unsigned times signed bytes stay within int32 up to here."""
MIDDLE = 128
LARGEST = 127
SMALLEST = LARGEST * torch.finfo(torch.float32).tiny
FEW = 24 if cpu.TILES else 32
"""Tokens up to which fbgemm's kernel is the faster one."""
SMALL, FEW_OF_SMALL = 2**22, 24 if cpu.TILES else 128
"""The same for matrices of fewer weights than the first of these: oneDNN takes more calls, which show there."""


def _is_available() -> bool:
    if not torch._C._has_mkldnn or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    return cpu.VECTORS == "AVX512" and bool(cpu.CAPABILITIES.get("avx512_vnni"))


AVAILABLE = _is_available()
"""Whether there are integer dot products: without VNNI oneDNN adds in 16 bits, which overflow."""
FEW_AVAILABLE = (
    AVAILABLE
    and "fbgemm" in torch.backends.quantized.supported_engines
    and hasattr(torch, "_make_per_channel_quantized_tensor")
    and hasattr(torch.ops.quantized, "linear_prepack")
    and hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
)
"""Whether torch has fbgemm's kernel: it packs tensors of a kind that a later torch will not have."""


def _few_kernel() -> Callable[..., Tensor]:
    """The operator without what torch's wrapper around it does first: look through the packed object, in Python."""
    operator = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
    return getattr(operator, "_op", operator)


if FEW_AVAILABLE:
    _multiply = _few_kernel()


@dataclass(frozen=True)
class Int8Matrix:
    """An int8 matrix in oneDNN's order, a byte a weight, and what its kernel asks for besides.

    Attributes:
        weight: reordered codes.
        scale: of each row, float32.
        zeros: the rows' zero points.
    """

    weight: Tensor
    scale: Tensor
    zeros: Tensor


@dataclass(frozen=True)
class FewInt8Matrix:
    """An int8 matrix in fbgemm's order, a byte a weight.

    Attributes:
        packed: torch's object for it, which shows no tensors.
        nbytes: of it.
    """

    packed: Any
    nbytes: int


@dataclass(frozen=True)
class Int8Parts:
    """Codes ``[out, columns]`` and the scales of their rows."""

    codes: Tensor
    scale: Tensor


def fits(shape: tuple[int, int]) -> bool:
    """Whether the kernel can be given such a matrix, and is right and fast here."""
    return AVAILABLE and shape[0] > 0 and 0 < shape[1] <= MOST_COLUMNS


def takes_few(tokens: int) -> bool:
    """Whether so many tokens go to fbgemm's kernel, and torch would pack weights for it now."""
    return FEW_AVAILABLE and tokens <= FEW and torch.backends.quantized.engine in ("x86", "fbgemm")


def most_merged(shape: tuple[int, int]) -> int:
    """Up to how many tokens fbgemm's kernel is the faster one for a matrix of a merged sum, which keeps it anyway."""
    return FEW_OF_SMALL if shape[0] * shape[1] < SMALL else FEW


def int8_matrix(codes: Int8[Tensor, "out columns"], scale: Float[Tensor, " out"]) -> Int8Matrix:
    """Bring codes into oneDNN's order."""
    zeros = torch.zeros(codes.shape[0], dtype=torch.int32, device=codes.device)
    return Int8Matrix(torch.ops.onednn.qlinear_prepack(codes, None), scale.float(), zeros)


def few_int8_matrix(parts: Sequence[Int8Parts]) -> FewInt8Matrix:
    """Bring codes into fbgemm's order, those of several matrices below each other."""
    codes, scale = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])
    zeros = torch.zeros(codes.shape[0], dtype=torch.int64, device=codes.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
        rows = torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros, 0)
    return FewInt8Matrix(torch.ops.quantized.linear_prepack(rows, None), codes.nbytes)


def round_rows(x: Float[Tensor, "rows columns"]) -> tuple[UInt8[Tensor, "rows columns"], Float[Tensor, "rows 1"]]:
    """:func:`ffsplit.kernels.int8.round_rows` in as few passes as torch has, with every code moved up by 128.

    What is within 1e-5 of the middle between two codes may be taken for it. Codes of a row whose scale is no
    number mean nothing, and neither does what is multiplied by that scale.
    """
    wide = x.float()
    # Signed bytes are what torch writes fast; the highest bit moves them up.
    scale = torch.maximum(wide.amax(1, keepdim=True), wide.amin(1, keepdim=True).neg_())
    scale = scale.clamp_min_(SMALLEST).div_(LARGEST)
    return wide.mul(scale.reciprocal()).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(MIDDLE), scale


def product(a: UInt8[Tensor, "rows columns"], b: Int8Matrix) -> Float[Tensor, "rows out"]:
    """``(a - 128) b^T``: exact int32 sums, as float32, times the scales of ``b``."""
    # The fast kernels take unsigned inputs; the zero point is taken back in integers.
    found: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        a, 1.0, MIDDLE, b.weight, b.scale, b.zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return found


def few_product(x: Float[Tensor, "tokens columns"], b: FewInt8Matrix) -> Float[Tensor, "tokens out"]:
    """``x b^T`` in float32, every token rounded as by :func:`round_rows`, but for ties and the last bits."""
    wide = x.float()
    if wide.shape[0] == 1:  # one token's scale is one number, which the kernel takes
        largest = wide.abs().amax().item()
        if math.isfinite(largest):
            found: Tensor = _multiply(wide, max(largest, SMALLEST) / LARGEST, MIDDLE, b.packed)
            return found
    # Every call counts here: rows are brought to at most 1, which is 127 steps of the kernel.
    largest_of_row = wide.abs().amax(1, keepdim=True).clamp_min_(SMALLEST)
    found = _multiply(wide.div(largest_of_row), 1 / LARGEST, MIDDLE, b.packed)
    return found.mul_(largest_of_row)
