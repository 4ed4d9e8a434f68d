"""Times of single FFNs with their weights out of the cache, as they are when a model's other layers ran in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from ffsplit.bench.caches import Flush, cold_bytes
from ffsplit.bench.graphs import can_capture, captured
from ffsplit.bench.memory import stored_bytes
from ffsplit.bench.roofline import seconds_of
from ffsplit.timing import Clock, Measure, medians

FEW_TOKENS = 256
"""Below this many the weights are most of what moves, so it matters where they come from."""
MOST_COPIES = 64
PASSES = 8
"""How often a graph is replayed between two looks at the clock."""


def time_ffns(
    modules: Mapping[str, nn.Module],
    x: Tensor,
    *,
    rounds: int,
    warmup: int,
    clock: Clock,
    flush: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Median seconds of a forward of each, taken in turns.

    On a CPU the last cache is emptied before every forward of less than 256 tokens. On an accelerator copies of an FFN
    run one after another until their weights exceed the cache, as one graph where torch can record one.

    Args:
        modules: FFNs by name, on the device of ``x``.
        x: input, ``[tokens, d_model]``.
        rounds: timed turns of each.
        warmup: turns before those.
        clock: seconds, monotonic.
        flush: empties the cache; made when not given.
    """
    if x.device.type == "cpu":
        cold = flush or Flush(x.device) if x.shape[0] < FEW_TOKENS else None
        measures: list[Measure] = [partial(_once, module, x, clock, cold) for module in modules.values()]
    else:
        measures = [_rotating(module, x, clock) for module in modules.values()]
    with torch.inference_mode():
        return dict(zip(modules, medians(measures, rounds, warmup), strict=True))


def _once(module: nn.Module, x: Tensor, clock: Clock, cold: Callable[[], None] | None) -> float:
    if cold is not None:
        cold()
        x = x.clone()  # what a layer is given was written just before
    return seconds_of(partial(module, x), x.device, clock)


def _rotating(module: nn.Module, x: Tensor, clock: Clock) -> Measure:
    # Not in inference mode: kernels keep nothing of tensors that were made there.
    copies = [module, *(deepcopy(module) for _ in range(copies_needed(module, x) - 1))]

    def all_of_them() -> None:
        for copy in copies:
            copy(x)

    with torch.inference_mode():
        work = captured(all_of_them, x.device) if can_capture(x.device) else all_of_them

    def passes() -> None:
        for _ in range(PASSES):
            work()

    return lambda: seconds_of(passes, x.device, clock) / (PASSES * len(copies))


def copies_needed(module: nn.Module, x: Tensor) -> int:
    """How many copies of an FFN take turns, so that none finds its weights in the cache."""
    if x.shape[0] >= FEW_TOKENS:
        return 1
    return min(MOST_COPIES, 1 + cold_bytes(x.device) // max(stored_bytes(module), 1))
