"""What this machine can do at best, measured on the spot: bandwidth, matrix products, and the cost of a call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ffsplit.bench.caches import cold_bytes
from ffsplit.bench.graphs import can_capture, captured
from ffsplit.timing import Clock, medians, synchronize

ROUNDS, WARMUP = 5, 1
CALLS = 200
GEMM_SIZE = {"cpu": 1536}
ACCELERATOR_GEMM_SIZE = 8192
LEAST_BYTES = 1 << 20
ACCELERATOR_BYTES = 1 << 30
"""So much that waiting for the device hardly counts."""


@dataclass(frozen=True)
class Roofline:
    """A machine's limits.

    Attributes:
        copy: bytes per second of a copy larger than the last cache; what is read and what is written count.
        read: bytes per second of a dot product as large, which only reads, as weights are read.
        gemm: floating-point operations per second of a large square product in ``dtype``; a multiply-accumulate is 2.
        call_seconds: of one small operation among many, as a forward issues them (inside a graph where there are).
        dtype: of the products.
    """

    copy: float
    read: float
    gemm: float
    call_seconds: float
    dtype: str

    @property
    def bandwidth(self) -> float:
        """The faster of the two: some processors read a line before they overwrite it, and a copy counts less then."""
        return max(self.copy, self.read)

    def seconds(self, moved: float, macs: float) -> float:
        """The least time for so many bytes to move and so many multiply-accumulates."""
        return max(moved / self.bandwidth, 2 * macs / self.gemm)

    def bound(self, moved: float, macs: float) -> str:
        """``memory`` or ``compute``: which of the two takes longer at best."""
        return "memory" if moved / self.bandwidth >= 2 * macs / self.gemm else "compute"


def measure_roofline(device: torch.device, dtype: torch.dtype, clock: Clock = time.perf_counter) -> Roofline:
    """Measure a device, in about a second."""
    least = LEAST_BYTES if device.type == "cpu" else ACCELERATOR_BYTES
    source = torch.ones(max(cold_bytes(device), least) // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    size = GEMM_SIZE.get(device.type, ACCELERATOR_GEMM_SIZE)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    little = torch.zeros(8, device=device)

    def calls() -> None:
        for _ in range(CALLS):
            little.add_(1.0)

    with torch.inference_mode():
        many = captured(calls, device) if can_capture(device) else calls
        works: list[Callable[[], object]] = [
            partial(target.copy_, source),
            partial(torch.dot, source, target),
            partial(torch.mm, left, right),
            many,
        ]
        copied, dotted, multiplied, called = medians(
            [partial(seconds_of, work, device, clock) for work in works], ROUNDS, WARMUP
        )
    return Roofline(
        copy=2 * source.nbytes / copied,
        read=2 * source.nbytes / dotted,
        gemm=2 * size**3 / multiplied,
        call_seconds=called / CALLS,
        dtype=str(dtype).removeprefix("torch."),
    )


def seconds_of(work: Callable[[], object], device: torch.device, clock: Clock) -> float:
    """The time of some work, until the device has done it."""
    synchronize(device)
    started = clock()
    work()
    synchronize(device)
    return clock() - started
