"""When a matrix kept by columns is multiplied faster on this CPU: where ``kernels/cpu_columns.py`` has its limits from.

One thread; clock and cache as in ``cpu.py``. How many times as long the product with the same matrix by rows takes.

    python benchmarks/cpu_columns.py [--rounds 25]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from _common import write_result
from cpu import FLOATS, described, on_one_thread, once, parser_of
from ffsplit.bench.caches import Flush
from ffsplit.timing import medians

# Second factors of low-rank matrices; then first ones and dense matrices.
SHAPES = ((5120, 704), (2048, 704), (2816, 256), (768, 256), (704, 5120), (704, 2048), (2048, 2816), (5632, 2048))
TOKENS = (1, 2, 4, 8, 16, 64)


def by_rows_over_by_columns(
    shape: tuple[int, int], tokens: int, dtype: torch.dtype, rounds: int, flush: Callable[[], None]
) -> float:
    """Of the times of one product."""
    by_rows = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    by_columns = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    by_columns.weight = nn.Parameter(by_rows.weight.detach().t().contiguous().t())
    x = torch.randn(tokens, shape[1]).to(dtype)
    rows, columns = medians([partial(once, module, x, flush) for module in (by_rows, by_columns)], rounds, warmup=1)
    return rows / columns


def main() -> None:
    options = parser_of(__doc__, rounds=25).parse_args()
    on_one_thread()
    flush = Flush(torch.device("cpu"))
    found: dict[str, dict[str, dict[str, float]]] = {}
    with torch.no_grad():
        for short, dtype in FLOATS.items():
            found[short] = {}
            for shape in SHAPES:
                ratios = {
                    str(tokens): round(by_rows_over_by_columns(shape, tokens, dtype, options.rounds, flush), 2)
                    for tokens in TOKENS
                }
                found[short]["x".join(map(str, shape))] = ratios
                print(short, shape, ratios, flush=True)
    write_result("cpu-columns", described() | {"by_rows_over_by_columns": found})


if __name__ == "__main__":
    main()
