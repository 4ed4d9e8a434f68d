"""Timing the variants of an encoder in torch: eager, as recorded graphs, and with their layers compiled."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from _glue_variants import Variant
from ffsplit.bench.graphs import captured
from ffsplit.families.surgery import restore
from ffsplit.timing import Clock, medians, synchronize

TURN = 0.03
"""Seconds that a dense turn takes at least, in forwards."""
MOST_REPEATS = 20
WARMUP = 2
Work = Callable[[], object]


@dataclass(frozen=True)
class Column:
    """One way to run a model.

    Attributes:
        graph: recorded once and replayed, so that the time holds no Python and no launches.
        compiled: every layer of the encoder by torch.compile, for these sizes alone.
    """

    batch: int
    graph: bool = False
    compiled: bool = False

    @property
    def title(self) -> str:
        return f"batch {self.batch}, {'compiled ' * self.compiled}{'graph' if self.graph else 'eager'}"


@dataclass
class CompileBudget:
    """Seconds that may be spent on compiling, all together; what comes later is not compiled any more."""

    seconds: float
    spent: float = 0.0


@dataclass(frozen=True)
class Timed:
    """Of one variant in one column.

    Attributes:
        seconds: of one forward, the median; None if it could not be run.
        compile_seconds: the first forward of a compiled model.
        failed: why there is no time.
    """

    seconds: float | None
    compile_seconds: float | None = None
    failed: str | None = None


@dataclass(frozen=True)
class _Ready:
    """A variant that can be timed, or what came in between.

    Attributes:
        before: is done once a turn, untimed.
        work: one forward.
    """

    before: Work
    work: Work | None = None
    compile_seconds: float | None = None
    failed: str | None = None


def times(
    model: PreTrainedModel,
    variants: Sequence[Variant],
    ids: Tensor,
    column: Column,
    rounds: int,
    budget: CompileBudget,
    clock: Clock = time.perf_counter,
) -> list[Timed]:
    """The medians of all variants, which take turns; one that cannot be run does not stop the others."""
    with compiled_layers(model) if column.compiled else nullcontext():
        ready = [_ready(model, variant, ids, column, budget) for variant in variants]
        runs = [one for one in ready if one.work is not None]
        repeats = _repeats(runs[0], ids.device) if runs else 1
        found = iter(medians([_timer(one, ids.device, repeats, clock) for one in runs], rounds, WARMUP))
        return [Timed(next(found) if one.work is not None else None, one.compile_seconds, one.failed) for one in ready]


@contextmanager
def compiled_layers(model: PreTrainedModel) -> Iterator[None]:
    """Every layer of the encoder compiled, each on its own: they are alike, so that one compilation serves all."""
    import torch._dynamo

    layers: list[nn.Module] = list(model.encoder.layer)
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = 256  # one entry for every variant and size, all kept
    try:
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)  # type: ignore[method-assign]
        yield
    finally:
        torch._dynamo.config.recompile_limit = limit
        for layer in layers:
            del layer.forward


def _ready(model: PreTrainedModel, variant: Variant, ids: Tensor, column: Column, budget: CompileBudget) -> _Ready:
    if column.compiled and budget.spent > budget.seconds:
        return _Ready(_nothing, failed=f"not compiled: {budget.seconds:g} s of compiling were used up")

    def before() -> None:
        restore(model, variant.modules)

    work = partial(model, input_ids=ids)
    started = time.perf_counter()
    taken = None
    try:
        before()
        work()  # compiles; kernels are chosen
        synchronize(ids.device)
        if column.compiled:
            taken = time.perf_counter() - started
            budget.spent += taken
        if column.graph:
            return _Ready(_nothing, captured(work, ids.device), taken)
        return _Ready(before, work, taken)
    except Exception as error:  # of a compiler, anything: the other variants are still to be timed
        if column.compiled and taken is None:
            budget.spent += time.perf_counter() - started
        return _Ready(_nothing, None, taken, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")


def _nothing() -> None:
    pass


def _repeats(ready: _Ready, device: torch.device) -> int:
    """Forwards of a turn, from the time that the first model takes."""
    return min(max(math.ceil(TURN / _timer(ready, device, 1)()), 1), MOST_REPEATS)


def _timer(ready: _Ready, device: torch.device, repeats: int, clock: Clock = time.perf_counter) -> Callable[[], float]:
    work = ready.work
    assert work is not None

    def measure() -> float:
        ready.before()
        synchronize(device)
        started = clock()
        for _ in range(repeats):
            work()
        synchronize(device)
        return (clock() - started) / repeats

    return measure
