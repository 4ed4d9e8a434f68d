"""CUDA sources compiled by a real NVRTC, which needs no GPU, and how kernels are launched."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ffsplit.kernels import nvrtc

ARCHITECTURES = ("sm_80", "sm_90")
# Of low_bit: warps that share tokens and warps that do not, all widths, gates or none; the others whole.
INSTANCES = [
    ("low_bit", "arrange<8,4,128,false>"),
    ("low_bit", "inner<8,4,128,1,1,true,false,4,1,2,12288,12>"),
    ("low_bit", "inner<0,3,64,2,2,false,true,4,2,2,12800,16>"),
    ("low_bit", "outer<16,2,128,1,false,16,1,1,12288,16>"),
    ("low_bit", "outer<0,4,32,4,true,16,4,1,12288,16>"),
    ("threshold", "inner<1,true,false,1>"),
    ("threshold", "outer<false,2>"),
    ("float8_rows", "float8_rows<1,true,false,true,14>"),
    ("float8_rows", "float8_values<false>"),
    ("activation", "activation<1,true,false>"),
    ("activation", "activation<2,false,true>"),
]


@pytest.fixture(scope="module")
def compiler() -> ctypes.CDLL:
    """NVRTC as it comes from PyPI; that of CUDA 13.0, which torch 2.11 brings along, since old ones refuse more."""
    try:
        files = metadata.files("nvidia-cuda-nvrtc") or []
    except metadata.PackageNotFoundError:
        pytest.skip("there is no NVRTC for this platform")
    found = {file.name: str(file.locate()) for file in files if ".so." in file.name and ".alt." not in file.name}
    # The compiler looks for its built-in functions by name, and finds what is loaded already.
    for name in sorted(found, key=lambda name: "builtins" not in name):
        library = ctypes.CDLL(found[name], mode=ctypes.RTLD_GLOBAL)
    return library


@pytest.mark.parametrize(("name", "instance"), INSTANCES, ids=lambda text: text.partition("<")[0])
def test_sources_compile(compiler: ctypes.CDLL, name: str, instance: str) -> None:
    for architecture in ARCHITECTURES if name == "low_bit" else ARCHITECTURES[1:]:
        code, symbol = nvrtc.machine_code(nvrtc.source(name), instance, architecture, compiler)
        assert code.startswith(b"\x7fELF")
        assert symbol.encode() in code


def test_a_wrong_source_is_told(compiler: ctypes.CDLL) -> None:
    with pytest.raises(RuntimeError, match="undefined_name"):
        nvrtc.machine_code("template <int N> __global__ void f() { undefined_name; }", "f<1>", "sm_90", compiler)
    with pytest.raises(RuntimeError, match="nvrtcCompileProgram"):
        nvrtc.machine_code("template <int N> __global__ void f() {}", "f<1>", "sm_1", compiler)


def test_no_compiler_is_said_and_no_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing() -> object:
        raise OSError("no NVRTC")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(torch.cuda._utils, "_get_gpu_rtc_library", missing)
    with caplog.at_level(logging.WARNING):
        assert nvrtc.launcher("low_bit", "nothing", (), 7) is None
    assert "no NVRTC" in caplog.text


class Driver:
    """Stands in for the CUDA driver: answers with these codes, one a launch."""

    def __init__(self, *codes: int, version: int = 13000) -> None:
        self.codes, self.version, self.asked = list(codes), version, 0

    def cuLaunchKernel(self, *_: object) -> int:
        self.asked += 1
        return self.codes.pop(0)

    def cuCtxGetCurrent(self, found: Any) -> int:
        found._obj.value = None
        return 0

    def cuDriverGetVersion(self, found: Any) -> int:
        found._obj.value = self.version
        return 0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Driver], list[int]]:
    """Launch a kernel by a driver; gives the devices whose context the thread asked for."""

    def launch(driver: Driver) -> list[int]:
        bound: list[int] = []
        monkeypatch.setattr(torch.cuda._utils, "_get_gpu_runtime_library", lambda: driver)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
        monkeypatch.setattr(torch.cuda, "mem_get_info", bound.append)
        nvrtc.Launcher(SimpleNamespace(func=None), 0)((1, 1), 32, [1], [2])
        return bound

    return launch


def test_a_thread_without_a_context_gets_one(launched: Callable[[Driver], list[int]]) -> None:
    assert launched(Driver(nvrtc.NO_CONTEXT, 0)) == [0]
    assert launched(Driver(0)) == []


def test_what_a_driver_refuses_is_an_error(launched: Callable[[Driver], list[int]]) -> None:
    driver = Driver(nvrtc.NO_CONTEXT, nvrtc.NO_CONTEXT)
    with pytest.raises(RuntimeError, match="CUDA error 201"):
        launched(driver)
    assert driver.asked == 2
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        launched(Driver(700))


@pytest.mark.parametrize(
    ("version", "capability", "early"), [(12030, (9, 0), True), (12020, (9, 0), False), (13000, (8, 9), False)]
)
def test_early_launches_need_a_gpu_and_a_driver_for_them(
    monkeypatch: pytest.MonkeyPatch, version: int, capability: tuple[int, int], early: bool
) -> None:
    monkeypatch.setattr(torch.cuda._utils, "_get_gpu_runtime_library", lambda: Driver(version=version))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert nvrtc.launches_early.__wrapped__(0) is early
