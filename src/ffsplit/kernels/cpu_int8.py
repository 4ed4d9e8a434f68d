"""Int8 products on CPUs with integer dot products (VNNI), through torch's binding of oneDNN, weights reordered once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from ffsplit.kernels import cpu

MOST_COLUMNS = 65_000
"""Sums of unsigned times signed bytes stay within int32 up to here."""
MIDDLE = 128
LARGEST = 127
SMALLEST = LARGEST * torch.finfo(torch.float32).tiny
MIDDLE_AS_TENSOR = torch.full((), float(MIDDLE), dtype=torch.float32, device="cpu")


def _is_available() -> bool:
    if not torch._C._has_mkldnn or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    return cpu.VECTORS == "AVX512" and bool(cpu.CAPABILITIES.get("avx512_vnni"))


AVAILABLE = _is_available()
"""Whether there are integer dot products: without VNNI oneDNN adds in 16 bits, which overflow."""


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


def fits(shape: tuple[int, int]) -> bool:
    """Whether the kernel can be given such a matrix, and is right and fast here."""
    return AVAILABLE and shape[0] > 0 and 0 < shape[1] <= MOST_COLUMNS


def int8_matrix(codes: Int8[Tensor, "out columns"], scale: Float[Tensor, " out"]) -> Int8Matrix:
    """Bring codes into oneDNN's order."""
    zeros = torch.zeros(codes.shape[0], dtype=torch.int32, device=codes.device)
    return Int8Matrix(torch.ops.onednn.qlinear_prepack(codes, None), scale.float(), zeros)


def round_rows(x: Float[Tensor, "rows columns"]) -> tuple[UInt8[Tensor, "rows columns"], Float[Tensor, "rows 1"]]:
    """:func:`ffsplit.kernels.int8.round_rows` in as few passes as torch has, with every code moved up by 128.

    What is within 1e-5 of the middle between two codes may be taken for it. Codes of a row whose scale is no
    number mean nothing, and neither does what is multiplied by that scale.
    """
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True).clamp_min_(SMALLEST).div_(LARGEST)
    # 128 is even, so halves are rounded to the same side as without it.
    return torch.addcdiv(MIDDLE_AS_TENSOR, wide, scale).round_().to(torch.uint8), scale


def product(a: UInt8[Tensor, "rows columns"], b: Int8Matrix) -> Float[Tensor, "rows out"]:
    """``(a - 128) b^T``: exact int32 sums, as float32, times the scales of ``b``."""
    # The fast kernels take unsigned inputs; the zero point is taken back in integers.
    found: Tensor = torch.ops.onednn.qlinear_pointwise(
        a, 1.0, MIDDLE, b.weight, b.scale, b.zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return found
