"""CUDA sources of this folder, compiled at their first use by the compiler that every CUDA build of torch brings along.

No toolkit, headers or host compiler are needed. A kernel is compiled once and kept for the process.
"""

from __future__ import annotations

import ctypes
import logging
import struct
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from threading import Lock
from typing import Any

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)
"""bfloat16 tensor cores and their instructions."""
EARLY_LAUNCH = (9, 0)
"""A kernel may start before the one in front has ended, and waits for it by an instruction of its own."""
EARLY_IN_GRAPHS = 12030
"""CUDA's version, as its driver writes it, from which a graph can hold such a launch."""
NO_CONTEXT = 201
"""CUresult of cuda.h."""
PROGRAMMATIC_STREAM_SERIALIZATION = 6
"""CUlaunchAttributeID of cuda.h."""
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
"""CUfunction_attribute of cuda.h."""
SHARED_UNASKED = 48 * 1024
"""Bytes of shared memory that every block may have."""

_logger = logging.getLogger(__name__)


@cache
def source(name: str) -> str:
    """The text of ``cuda/<name>.cu`` with that of ``cuda/values.cuh`` before it: NVRTC knows no folders."""
    folder = files("ffsplit.kernels").joinpath("cuda")
    return "\n".join(folder.joinpath(part).read_text(encoding="utf-8") for part in ("values.cuh", f"{name}.cu"))


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h: which it is, and a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_uint32), ("pad", ctypes.c_uint32), ("value", ctypes.c_uint32 * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint32),
    )


_EARLY = (_Attribute * 1)(_Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,)))


class Launcher:
    """A compiled kernel: first its pointers, then its integers, one-dimensional blocks.

    Args:
        compiled: what torch made of the source.
        device: index of the CUDA device.
        shared: bytes of dynamic shared memory of a block.

    Raises:
        RuntimeError: the device has less shared memory.
    """

    def __init__(self, compiled: Any, device: int, shared: int = 0) -> None:
        self._kernel = compiled  # owns the module that holds the function
        self._device = device
        self._shared = shared
        self._lock = Lock()
        self._driver = torch.cuda._utils._get_gpu_runtime_library()
        self._counts: tuple[int, int] = (-1, -1)
        self._config = _Config((1, 1, 1), (1, 1, 1), shared, None, _EARLY, len(_EARLY))
        if shared > SHARED_UNASKED:
            failed = self._driver.cuFuncSetAttribute(compiled.func, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
            if failed:
                raise RuntimeError(f"no {shared} bytes of shared memory for a block: CUDA error {failed}")

    def __call__(
        self, grid: tuple[int, int], block: int, pointers: list[int], integers: list[int], *, early: bool = False
    ) -> None:
        """Launch it in the current stream of its device; addresses are not checked.

        Args:
            grid: blocks.
            block: threads of a block.
            pointers: the kernel's first arguments.
            integers: its others.
            early: where the device can, start before the kernel in front has ended; the kernel must wait for that.

        Raises:
            RuntimeError: the driver refused it.
        """
        if torch.cuda.current_device() == self._device:
            failed = self._run(grid, block, pointers, integers, early)
            if failed == NO_CONTEXT:
                bind(self._device)
                failed = self._run(grid, block, pointers, integers, early)
        else:  # layers spread over several GPUs run without a change of the current one
            with torch.cuda.device(self._device):
                failed = self._run(grid, block, pointers, integers, early)
        if failed:
            raise RuntimeError(f"a kernel could not be launched: CUDA error {failed}")

    def _run(self, grid: tuple[int, int], block: int, pointers: list[int], integers: list[int], early: bool) -> int:
        """Launch it, and give the driver's error code."""
        stream = _current_stream(self._device)
        with self._lock:  # threads share the places of the arguments
            if self._counts != (len(pointers), len(integers)):
                self._lay_out(len(pointers), len(integers))
            self._format.pack_into(self._values, 0, *pointers, *integers)
            if early and launches_early(self._device):
                config = self._config
                config.grid[:2], config.block[0], config.stream = grid, block, stream
                failed = self._driver.cuLaunchKernelEx(ctypes.byref(config), self._kernel.func, self._arguments, None)
            else:
                size = (*grid, 1, block, 1, 1, self._shared, ctypes.c_void_p(stream))
                failed = self._driver.cuLaunchKernel(self._kernel.func, *size, self._arguments, None)
        return int(failed)

    def _lay_out(self, pointers: int, integers: int) -> None:
        """Places for the arguments and their addresses, made once: the driver copies the values at every launch."""
        self._format = struct.Struct(f"@{pointers}Q{integers}i")
        self._values = ctypes.create_string_buffer(self._format.size)
        first = ctypes.addressof(self._values)
        second = first + 8 * pointers
        addresses = [first + 8 * at for at in range(pointers)] + [second + 4 * at for at in range(integers)]
        self._arguments = (ctypes.c_void_p * len(addresses))(*addresses)
        self._counts = (pointers, integers)


def _current_stream(device: int) -> int:
    """The handle of a device's current stream, in one call where this torch has it."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return int(torch.cuda.current_stream().cuda_stream if raw is None else raw(device))


def addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    """Where tensors start, as a kernel's pointers; 0 for what is not there."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def bind(device: int) -> None:
    """Give the calling thread the device's context if it has none: one comes with its first call of CUDA's runtime."""
    context, driver = ctypes.c_void_p(), torch.cuda._utils._get_gpu_runtime_library()
    if driver.cuCtxGetCurrent(ctypes.byref(context)) or not context.value:
        torch.cuda.mem_get_info(device)  # a call of the runtime that changes nothing


def machine_code(text: str, instance: str, architecture: str, library: Any) -> tuple[bytes, str]:
    """One instance of a kernel, compiled, and the name that it has in there.

    torch's own ``_compile_kernel`` does the same, but wants a CUDA toolkit for headers that these sources do not need.

    Args:
        text: the source.
        instance: as :func:`instance_of` writes it.
        architecture: ``sm_90``, for example.
        library: NVRTC, a ``ctypes.CDLL``.

    Raises:
        RuntimeError: the source is wrong, or the compiler does not know the architecture.
    """
    program = ctypes.c_void_p()

    def call(name: str, *arguments: Any) -> None:
        failed = getattr(library, name)(*arguments)
        if failed:
            raise RuntimeError(f"{name} failed with {failed}{_log_of(library, program)}")

    def read(what: str) -> bytes:
        size = ctypes.c_size_t()
        call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        found = ctypes.create_string_buffer(size.value)
        call(f"nvrtcGet{what}", program, found)
        return found.raw

    call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), b"source.cu", 0, None, None)
    try:
        call("nvrtcAddNameExpression", program, instance.encode())
        options = (ctypes.c_char_p * 2)(b"--std=c++17", f"--gpu-architecture={architecture}".encode())
        call("nvrtcCompileProgram", program, len(options), options)
        symbol = ctypes.c_char_p()
        call("nvrtcGetLoweredName", program, instance.encode(), ctypes.byref(symbol))
        return read("CUBIN"), (symbol.value or b"").decode()
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _log_of(library: Any, program: ctypes.c_void_p) -> str:
    """What the compiler said about a program, from a new line on."""
    size = ctypes.c_size_t()
    if library.nvrtcGetProgramLogSize(program, ctypes.byref(size)) or size.value <= 1:
        return ""
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    return "\n" + log.value.decode(errors="replace")


def instance_of(kernel: str, arguments: tuple[int, ...]) -> str:
    """A kernel with the arguments of its template, as C++ writes them."""
    words = (str(argument).lower() if isinstance(argument, bool) else str(argument) for argument in arguments)
    return f"{kernel}<{','.join(words)}>"


@cache
def launcher(name: str, kernel: str, arguments: tuple[int, ...], device: int, shared: int = 0) -> Launcher | None:
    """A kernel ready to be launched; None, and said once, where it cannot be compiled.

    Args:
        name: of the source.
        kernel: of that source.
        arguments: of its template; a bool is one of C++.
        device: index of the CUDA device.
        shared: bytes of dynamic shared memory of a block.
    """
    instance = instance_of(kernel, arguments)
    major, minor = torch.cuda.get_device_capability(device)
    try:
        library: Any = torch.cuda._utils._get_gpu_rtc_library()
        code, symbol = machine_code(source(name), instance, f"sm_{major}{minor}", library)
        with torch.cuda.device(device):
            bind(device)
            kernels: Any = torch.cuda._utils._cuda_load_module(code, [symbol])
            return Launcher(kernels[symbol], device, shared)
    except (RuntimeError, OSError, AttributeError) as error:
        # A machine without NVRTC or with a driver older than it is served by the plain path, more slowly.
        _logger.warning("%s could not be compiled, FFNs run without it: %s", instance, error)
        return None


def is_supported(device: int) -> bool:
    """Whether an NVIDIA GPU can run the kernels of this folder; traceable."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


@cache
def launches_early(device: int) -> bool:
    """Whether a kernel can start before the one in front has ended, in a graph too."""
    version = ctypes.c_int()
    driver: Any = torch.cuda._utils._get_gpu_runtime_library()
    known = not driver.cuDriverGetVersion(ctypes.byref(version)) and version.value >= EARLY_IN_GRAPHS
    return known and torch.cuda.get_device_capability(device) >= EARLY_LAUNCH


def processors(device: int) -> int:
    """How many multiprocessors a GPU has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def shared_memory(device: int) -> int:
    """Bytes of shared memory that a block of threads can have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
