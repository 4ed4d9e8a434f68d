"""CUDA sources of this folder, compiled at their first use by the compiler that every CUDA build of torch brings along.

No toolkit, headers or host compiler are needed. A kernel is compiled in about a second and kept for the process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

import torch

LEAST_CAPABILITY = (8, 0)
"""bfloat16 tensor cores and their instructions."""
Kernel = Callable[..., None]

_logger = logging.getLogger(__name__)


@cache
def source(name: str) -> str:
    """The text of ``cuda/<name>.cu``."""
    return files("ffsplit.kernels").joinpath("cuda", f"{name}.cu").read_text(encoding="utf-8")


@cache
def kernel(name: str, instance: str, device: int) -> Kernel | None:
    """A kernel, to be launched with ``grid``, ``block`` and ``args``; None, and said once, where it cannot be compiled.

    Args:
        name: of the source.
        instance: the kernel with its template arguments.
        device: index of the CUDA device.
    """
    compile_source: Any = getattr(torch.cuda, "_compile_kernel", None)
    if compile_source is None:
        _logger.warning("this torch has no torch.cuda._compile_kernel: low-bit FFNs are decoded before multiplying")
        return None
    try:
        with torch.cuda.device(device):
            found: Kernel = compile_source(source(name), instance, nvcc_options=["--std=c++17"])
    except (RuntimeError, OSError, AttributeError) as error:
        # A machine without NVRTC or with a driver older than it is served by the plain path, more slowly.
        _logger.warning("%s could not be compiled, low-bit FFNs are decoded before multiplying: %s", instance, error)
        return None
    return found


@cache
def is_supported(device: int) -> bool:
    """Whether an NVIDIA GPU can run the kernels of this folder."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
