"""CUDA sources of this folder, compiled at their first use by the compiler that every CUDA build of torch brings along.

No toolkit, headers or host compiler are needed. A kernel is compiled once and kept for the process.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from importlib.resources import files
from threading import Lock
from typing import Any

import torch

FAST_MEMORY = 4e12
"""Bytes a second: an H100 has 3.35e12, an H200 4.8e12."""
LEAST_CAPABILITY = (8, 0)
"""bfloat16 tensor cores and their instructions."""

_logger = logging.getLogger(__name__)


@cache
def source(name: str) -> str:
    """The text of ``cuda/<name>.cu`` with that of ``cuda/values.cuh`` before it: NVRTC knows no folders."""
    folder = files("ffsplit.kernels").joinpath("cuda")
    return "\n".join(folder.joinpath(part).read_text(encoding="utf-8") for part in ("values.cuh", f"{name}.cu"))


class Launcher:
    """A compiled kernel: first its pointers, then its integers, one-dimensional blocks."""

    def __init__(self, compiled: Any, device: int) -> None:
        self._kernel = compiled  # owns the module that holds the function
        self._device = device
        self._lock = Lock()
        self._launch = torch.cuda._utils._get_gpu_runtime_library().cuLaunchKernel
        self._cache: tuple[int, int] = (-1, -1)

    def __call__(self, grid: tuple[int, int], block: int, pointers: list[int], integers: list[int]) -> None:
        """Launch it in the current stream of its device; addresses are not checked."""
        if torch.cuda.current_device() == self._device:
            self._run(grid, block, pointers, integers)
            return
        # Layers spread over several GPUs run without a change of the current one.
        with torch.cuda.device(self._device):
            self._run(grid, block, pointers, integers)

    def _run(self, grid: tuple[int, int], block: int, pointers: list[int], integers: list[int]) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        with self._lock:  # threads share the places of the arguments
            if self._cache != (len(pointers), len(integers)):
                self._lay_out(len(pointers), len(integers))
            self._pointers[:] = [*pointers]
            self._integers[:] = [*integers]
            failed = self._launch(
                self._kernel.func, *grid, 1, block, 1, 1, 0, ctypes.c_void_p(stream), self._arguments, None
            )
        if failed:
            raise RuntimeError(f"a kernel could not be launched: CUDA error {failed}")

    def _lay_out(self, pointers: int, integers: int) -> None:
        """Places for the arguments and their addresses, made once: the driver copies the values at every launch."""
        self._pointers = (ctypes.c_uint64 * pointers)()
        self._integers = (ctypes.c_int32 * integers)()
        first, second = ctypes.addressof(self._pointers), ctypes.addressof(self._integers)
        addresses = [first + 8 * at for at in range(pointers)] + [second + 4 * at for at in range(integers)]
        self._arguments = (ctypes.c_void_p * len(addresses))(*addresses)
        self._cache = (pointers, integers)


def instance_of(kernel: str, arguments: tuple[int, ...]) -> str:
    """A kernel with the arguments of its template, as C++ writes them."""
    words = (str(argument).lower() if isinstance(argument, bool) else str(argument) for argument in arguments)
    return f"{kernel}<{','.join(words)}>"


@cache
def launcher(name: str, kernel: str, arguments: tuple[int, ...], device: int) -> Launcher | None:
    """A kernel ready to be launched; None, and said once, where it cannot be compiled.

    Args:
        name: of the source.
        kernel: of that source.
        arguments: of its template; a bool is one of C++.
        device: index of the CUDA device.
    """
    instance = instance_of(kernel, arguments)
    compile_source: Any = getattr(torch.cuda, "_compile_kernel", None)
    if compile_source is None:
        _logger.warning("this torch has no torch.cuda._compile_kernel: FFNs run without kernels of their own")
        return None
    try:
        with torch.cuda.device(device):
            return Launcher(compile_source(source(name), instance, nvcc_options=["--std=c++17"]), device)
    except (RuntimeError, OSError, AttributeError) as error:
        # A machine without NVRTC or with a driver older than it is served by the plain path, more slowly.
        _logger.warning("%s could not be compiled, FFNs run without it: %s", instance, error)
        return None


def is_supported(device: int) -> bool:
    """Whether an NVIDIA GPU can run the kernels of this folder; traceable."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def processors(device: int) -> int:
    """How many multiprocessors a GPU has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_fast_memory(device: int) -> bool:
    """Whether a GPU's memory moves more than :data:`FAST_MEMORY` bytes a second, by its data sheet."""
    properties = torch.cuda.get_device_properties(device)
    clock, width = (getattr(properties, name, None) for name in ("memory_clock_rate", "memory_bus_width"))
    if clock is None or width is None:  # unknown: what follows from fast memory is the safer choice
        return True
    # Twice the clock, in kHz, for both edges; the width is in bits.
    return bool(2e3 * clock * width / 8 > FAST_MEMORY)
