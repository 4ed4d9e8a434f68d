"""Which of a storage's forwards is run: decided anew for every call, from what is known without looking at numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ffsplit.kernels import cpu_int4, cpu_int8

SMALLEST = 2**16
"""Weights below which a matrix is decoded as it always was: nothing to gain, and small examples stay exact."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_reference_only: ContextVar[bool] = ContextVar("reference_only", default=False)
_exact_products: ContextVar[bool] = ContextVar("exact_products", default=False)


class Path(StrEnum):
    """A way to multiply by a packed matrix."""

    REFERENCE = "reference"
    """Decode and multiply, keep nothing: anywhere, traceable, with gradients."""
    DECODED = "decoded"
    """Multiply by the decoded matrix, which is kept."""
    CPU_INT4 = "cpu_int4"
    """torch's int4 kernel for CPUs."""


@contextmanager
def reference_only() -> Iterator[None]:
    """Within this, every storage takes its reference path."""
    token = _reference_only.set(True)
    try:
        yield
    finally:
        _reference_only.reset(token)


@contextmanager
def exact_products(wanted: bool = True) -> Iterator[None]:
    """Within this, many tokens are multiplied in their own dtype: fits and scores are the same on every CPU.

    Args:
        wanted: False, to take time as users will, undoes it within.
    """
    token = _exact_products.set(wanted)
    try:
        yield
    finally:
        _exact_products.reset(token)


def may_round() -> bool:
    """Whether a product of many tokens may be in a faster dtype, where that costs nothing beside the codes."""
    return not _exact_products.get()


def packed_path(x: Tensor, shape: tuple[int, int], *, bits: int, group: int, sources: Sequence[Tensor | None]) -> Path:
    """How to multiply these inputs by a packed matrix.

    Args:
        x: ``[*tokens, columns]``.
        shape: rows and columns of the matrix.
        bits: of its codes.
        group: columns that share a scale.
        sources: the stored tensors.
    """
    if not takes_kernels(x, sources) or shape[0] * shape[1] < SMALLEST or x.dtype not in FLOATS:
        return Path.REFERENCE
    if x.device.type == "cpu":
        few = x.numel() // shape[1] <= cpu_int4.most_tokens(bits)
        right = cpu_int4.fits(shape, group) and cpu_int4.is_precise_enough(as_autocast(x).dtype, bits)
        return Path.CPU_INT4 if few and right else Path.DECODED
    # Few tokens of an FFN that its kernels know do not come here: see ffsplit/kernels/low_bit.py.
    return Path.DECODED if x.device.type == "cuda" else Path.REFERENCE


def cpu_int8_takes(x: Tensor, codes: Tensor) -> bool:
    """Whether int8 products of these inputs, once rounded, and codes ``[out, columns]`` go to the CPU's kernel."""
    shape = codes.shape[0], codes.shape[1]
    if not takes_kernels(x, (codes,)) or codes.numel() < SMALLEST or x.dtype not in FLOATS:
        return False
    return x.device.type == "cpu" and cpu_int8.fits(shape)


def is_traced() -> bool:
    """Whether this call is being compiled, exported or traced, so that no size may be looked at."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def _is_transformed() -> bool:
    """Whether torch.func transforms this call, or derivatives go forward through it: kernels would not see either."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def takes_kernels(x: Tensor, sources: Sequence[Tensor | None]) -> bool:
    """Whether this call may run a kernel without gradient, from a cache: eager, not traced, nothing differentiated."""
    if is_traced() or _is_transformed() or _reference_only.get() or not x.numel():
        return False
    if type(x) not in (Tensor, nn.Parameter):  # fake tensors, functional ones, other subclasses
        return False
    differentiating = torch.is_grad_enabled()
    if differentiating and x.requires_grad:
        return False
    for source in sources:  # a loop, for it is run at every forward
        if source is not None and (
            source.is_inference() or source.device != x.device or (differentiating and source.requires_grad)
        ):
            return False
    return True


def is_differentiated(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a gradient of any is recorded."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def belong(x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Whether all tensors lie row after row where the inputs are, those of floating-point numbers in their dtype."""
    present = [tensor for tensor in tensors if tensor is not None]
    placed = all(t.device == x.device and t.is_contiguous() for t in present)
    return placed and all(t.dtype == x.dtype or not t.is_floating_point() for t in present)


def as_autocast(x: Tensor) -> Tensor:
    """The inputs in the dtype that autocast, if it is on, gives those of a product."""
    if x.dtype not in FLOATS or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
