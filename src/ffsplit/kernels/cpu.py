"""What this CPU is good at, as far as it decides between two ways to the same product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _capabilities() -> dict[str, Any]:
    """What torch tells of the CPU; nothing before it could."""
    return dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}


def fast_in_bfloat16(told: dict[str, Any]) -> bool:
    """Whether products of matrices are known to be several times faster in bfloat16 than in float32, rounding included.

    So it is on x86 with tiles (AMX) or AMD's dot products in bfloat16; Intel's take longer than float32 ones.
    """
    return bool(told.get("amx_bf16") or (told.get("avx512_bf16") and "AMD" in str(told.get("cpu_name"))))


def slow_in_bfloat16(told: dict[str, Any]) -> bool:
    """Whether products of matrices are faster in float32 than in bfloat16: on any other x86."""
    return told.get("architecture") == "x86_64" and not fast_in_bfloat16(told)


def adds_in_16_bits(told: dict[str, Any]) -> bool:
    """Whether products of unsigned and signed bytes may overflow: x86 without instructions for their dot products.

    Libraries then add pairs of them in 16 bits, where large ones are cut off.
    """
    whole = any(told.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return told.get("architecture") == "x86_64" and not whole


def float32_precision() -> str:
    """What ``torch.set_float32_matmul_precision`` was told; "highest" where newer switches differ by backend."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"


CAPABILITIES = _capabilities()
SATURATES = adds_in_16_bits(CAPABILITIES)
VECTORS = torch.backends.cpu.get_cpu_capability()
FAST_BFLOAT16 = fast_in_bfloat16(CAPABILITIES)
SLOW_BFLOAT16 = slow_in_bfloat16(CAPABILITIES)
TILES = bool(CAPABILITIES.get("amx_bf16"))


def product_dtype(x: Tensor, *, may_round: bool) -> torch.dtype:
    """In which dtype these inputs are best multiplied by a matrix that may be decoded into any.

    Args:
        x: the inputs.
        may_round: whether rounding inputs and outputs to bfloat16 costs nothing that counts beside the matrix's own.
    """
    if x.device.type == "cpu" and FAST_BFLOAT16 and may_round:
        return torch.bfloat16
    slow = SLOW_BFLOAT16 and x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if slow else x.dtype
