"""One token of FFNs under thresholds on one thread of a CPU; clock, cache and weights as in ``cpu.py``.

python benchmarks/cpu_thresholds.py [--rounds 9]
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from _common import write_result
from cpu import (
    FLOATS,
    SHAPES,
    Reference,
    described,
    made,
    on_one_thread,
    once,
    parser_of,
    structures,
    thresholded,
)
from ffsplit.bench.caches import Flush
from ffsplit.ffn.shape import FFNShape
from ffsplit.timing import medians

THRESHOLD_SHAPES = SHAPES | {"4096/11008 gated": FFNShape(4096, 11008, gated=True)}
SKIPPED = (0.3, 0.5, 0.7, 0.9)


def time_thresholds(rounds: int) -> dict[str, Any]:
    """One token of FFNs that leave out neurons under a threshold, and of the same with masks, over the dense one."""
    flush = Flush(torch.device("cpu"))
    found: dict[str, Any] = {}
    for name, shape in THRESHOLD_SHAPES.items():
        before = os.getloadavg()
        times = {short: thresholds_of(shape, dtype, rounds, flush) for short, dtype in FLOATS.items()}
        found[name] = {
            "milliseconds": times,
            "speed": {
                short: {variant: row["dense"] / value for variant, value in row.items()} for short, row in times.items()
            },
            "load_average": {"before": before, "after": os.getloadavg()},
        }
    return found


def thresholds_of(shape: FFNShape, dtype: torch.dtype, rounds: int, flush: Callable[[], None]) -> dict[str, float]:
    """Milliseconds by variant."""
    modules: dict[str, nn.Module] = {"dense": made(structures(shape)["dense"], shape.gated, dtype)}
    for skipped in SKIPPED:
        ffn = made(thresholded(shape, skipped), shape.gated, dtype)
        modules |= {f"{skipped:.0%} skipped": ffn, f"{skipped:.0%} masked": Reference(ffn)}
    x = torch.randn(1, shape.d_model).to(dtype)
    found = medians([partial(once, module, x, flush) for module in modules.values()], rounds, warmup=1)
    return {name: 1e3 * seconds for name, seconds in zip(modules, found, strict=True)}


def main() -> None:
    options = parser_of(__doc__, rounds=9).parse_args()
    on_one_thread()
    with torch.no_grad():  # modules made in inference mode could not keep anything
        write_result("cpu-thresholds", described() | {"thresholds": time_thresholds(options.rounds)})


if __name__ == "__main__":
    main()
