"""Activations by name, and a kernel that does all that lies between the matrices of an FFN in one pass.

A gated FFN in torch reads and writes its hidden activations five times there, more often with biases. At thousands of
tokens that shows beside products that became smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ffsplit.kernels import nvrtc
from ffsplit.kernels.dispatch import is_differentiated, takes_kernels

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda v: v,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda v: functional.gelu(v, approximate="tanh"),
    "relu": functional.relu,
    "relu_squared": lambda v: functional.relu(v).square(),
}
"""What kernels can compute; their sources count them in this order."""
NAMES = tuple(ACTIVATIONS)
HALVES = (torch.bfloat16, torch.float16)
THREADS = 256
COLUMNS = 8
"""Of a thread, which reads them at once."""
BYTES = 16
"""Where these start, a multiple of that."""


def biased(out: Float[Tensor, "*tokens columns"], bias: Float[Tensor, " columns"] | None) -> Tensor:
    """With a bias, if there is one."""
    return out if bias is None else out + bias


def activate(
    name: str | None,
    up: Float[Tensor, "*tokens neurons"],
    gate: Float[Tensor, "*tokens neurons"] | None,
    up_bias: Float[Tensor, " neurons"] | None = None,
    gate_bias: Float[Tensor, " neurons"] | None = None,
    out: Float[Tensor, "*tokens neurons"] | None = None,
) -> Float[Tensor, "*tokens neurons"] | None:
    """``act(gate + gate_bias) * (up + up_bias)``, or ``act(up + up_bias)``, rounded once, at the end.

    None where there is no kernel for it, or torch does it in one pass too: without gate and bias, rows in a row.

    Args:
        name: one of :data:`ACTIVATIONS`; None is an activation that has no name.
        up: on an NVIDIA GPU, in half precision; its rows may be parts of longer ones.
        gate: likewise; None is no gate.
        up_bias: None is no bias.
        gate_bias: likewise.
        out: is filled, and may be part of a longer one too; None is a new one.
    """
    if name is None or not up.is_cuda or up.dtype not in HALVES or not takes_kernels(up, ()):
        return None
    if torch.is_grad_enabled() and is_differentiated((gate, up_bias, gate_bias)):
        return None
    if gate is None and up_bias is None and up.is_contiguous():
        return None
    device = up.device
    if not all(_is_like(part, up, device) for part in (up, gate, up_bias, gate_bias, out) if part is not None):
        return None
    kernel = _kernel(name, gate is not None, up.dtype == torch.float16, device.index)
    if kernel is None:
        return None
    made, neurons = torch.empty_like(up, memory_format=torch.contiguous_format) if out is None else out, up.shape[-1]
    first, second, last = _rows(up), _rows(up if gate is None else gate), made.view(-1, neurons)
    pointers = nvrtc.addresses((first, second, up_bias, gate_bias, last))
    grid = first.shape[0], -(-neurons // (THREADS * COLUMNS))
    kernel(grid, THREADS, pointers, [neurons, first.stride(0), second.stride(0), last.stride(0)])
    return made


@cache
def _kernel(name: str, gated: bool, half: bool, device: int) -> nvrtc.Launcher | None:
    if not nvrtc.is_supported(device):
        return None
    return nvrtc.launcher("activation", "activation", (NAMES.index(name), gated, half), device)


def _is_like(part: Tensor, up: Tensor, device: torch.device) -> bool:
    """Whether rows start where a thread may read its columns at once, and are alike."""
    neurons = up.shape[-1]
    same = part.dtype == up.dtype and part.shape[-1] == neurons and part.device == device
    if not same or neurons % COLUMNS or part.stride(-1) != 1 or part.data_ptr() % BYTES:
        return False
    return all(stride % COLUMNS == 0 for stride in part.stride()[:-1])


def _rows(part: Tensor) -> Tensor:
    """Two-dimensional: a view, or a copy where no stride goes through all rows."""
    return part if part.ndim == 2 else part.reshape(-1, part.shape[-1])
