"""Int8 products on CPUs with integer dot products (VNNI), through torch's binding of oneDNN, weights reordered once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from ffsplit.kernels import cpu

MOST_COLUMNS = 65_000
"""Sums of unsigned times signed bytes stay within int32 up to here."""
MIDDLE = 128


def _is_available() -> bool:
    if not torch._C._has_mkldnn or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    return cpu.VECTORS == "AVX512" and bool(cpu.CAPABILITIES.get("avx512_vnni"))


AVAILABLE = _is_available()
"""Whether there are integer dot products: without VNNI oneDNN adds in 16 bits, which overflow."""


@dataclass(frozen=True)
class Int8Matrix:
    """An int8 matrix in oneDNN's order, a byte a weight, and what its kernel asks for besides."""

    weight: Tensor
    ones: Tensor
    zeros: Tensor


def fits(shape: tuple[int, int]) -> bool:
    """Whether the kernel can be given such a matrix, and is right and fast here."""
    return AVAILABLE and shape[0] > 0 and 0 < shape[1] <= MOST_COLUMNS


def int8_matrix(codes: Int8[Tensor, "out columns"]) -> Int8Matrix:
    """Bring codes into oneDNN's order."""
    rows = codes.shape[0]
    return Int8Matrix(
        torch.ops.onednn.qlinear_prepack(codes, None),
        torch.ones(rows),
        torch.zeros(rows, dtype=torch.int32),
    )


def product(a: Int8[Tensor, "rows columns"], b: Int8Matrix) -> Float[Tensor, "rows out"]:
    """``a b^T``: the int32 sums as float32."""
    # The fast kernels take unsigned inputs: moved by 128, which the given zero point takes back in integers.
    moved = a.view(torch.uint8) ^ MIDDLE
    found: Tensor = torch.ops.onednn.qlinear_pointwise(
        moved, 1.0, MIDDLE, b.weight, b.ones, b.zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return found
