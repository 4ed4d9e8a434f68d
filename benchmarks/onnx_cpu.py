"""Exported FFNs and encoders in ONNX Runtime on the CPU, one thread, beside dense float32 in the same run.

FFNs with random weights at 1 token, caches flushed before every timing, and at 128 tokens; MiniLM-L6 whole, one text of
128 tokens. Times are medians of turns; the ratio is dense over compressed, so above 1 is faster.

    python benchmarks/onnx_cpu.py [--rounds 41] [--only ffn|encoder] [--out NAME]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ffsplit
from _common import minilm, write_result
from ffsplit.export.check import session
from ffsplit.export.run import PACKAGES, export_onnx
from ffsplit.export.sums import exportable
from ffsplit.export.trace import GRAPH, trace_module
from ffsplit.ffn.projections import Dense, Int8Dynamic, Int8DynamicSpec, LowRank, Packed, Projection
from ffsplit.ffn.sum import Branch, SumFFN
from ffsplit.kernels.dispatch import reference_only
from ffsplit.ops.rounding import encode, fit_grid
from ffsplit.pipeline.load import open_source
from ffsplit.provenance import provenance
from ffsplit.timing import Clock, medians

SHAPES = ((2048, 5632, True), (768, 3072, False))
TOKENS = (1, 128)
KEEP, HEAVY, GROUP, ALIGN = 0.57, 0.25, 128, 64
FLUSH_BYTES = 512 << 20
# Of the issue, in times dense ONNX Runtime float32, measured there on a Zen 5: by row and tokens.
GOALS = {
    ("int8", 1): 3.4,
    ("int8", 128): 3.1,
    ("int4", 1): 5.0,
    ("int8 heavy + int4", 1): 4.5,
    ("split low rank", 1): 1.6,
    ("split low rank", 128): 1.6,
}
# Of the split's time over that of a pruned FFN with as many parameters.
LIMITS = {(2048, 1): 1.1, (2048, 128): 1.1, (768, 1): 1.3}
RECIPES: dict[str, dict[str, Any]] = {
    "int8": {"method": "w8a8"},
    "int4": {"method": "quantize", "code_bits": 4, "group": GROUP, "rounding": "rtn", "refit": False},
    "int8 heavy + int4": {
        "method": "ffsplit",
        "bits": 5.3,
        "heavy": HEAVY,
        "heavy_bits": 8,
        "rest_bits": 4,
        "group": GROUP,
    },
    "split low rank": {"method": "ffsplit", "keep": KEEP},
    "pruned": {"method": "prune", "keep": KEEP, "align": ALIGN},
}
CLOCKS = {"wall": perf_counter, "cpu": process_time}
Make = Callable[[int, int], Projection]


def matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) * columns**-0.5


def packed(bits: int, rows: int, columns: int, group: int = GROUP) -> Projection:
    weight = matrix(rows, columns)
    grid = fit_grid(weight, bits, group, symmetric=False)
    return Packed.from_codes(encode(weight, grid, bits), grid, bits=bits, group=group)


def int8(rows: int, columns: int) -> Projection:
    return Int8Dynamic.from_dense(matrix(rows, columns), Int8DynamicSpec(shape=(rows, columns)), torch.float32)


def dense(rows: int, columns: int) -> Projection:
    return Dense(matrix(rows, columns))


def low_rank(rank: int, rows: int, columns: int) -> Projection:
    return LowRank(matrix(rows, rank), matrix(rank, columns))


def sums(d_model: int, d_ff: int, gated: bool) -> dict[str, SumFFN]:
    """An FFN with random weights in every storage, the split and the pruned one with equal parameters."""

    def branch(neurons: int, make: Make) -> Branch:
        bias = None if gated else torch.randn(neurons)
        gate = make(neurons, d_model) if gated else None
        return Branch(nn.SiLU() if gated else nn.GELU(), make(neurons, d_model), make(d_model, neurons), gate, bias)

    def ffn(*branches: Branch) -> SumFFN:
        return SumFFN(d_model, branches, None, None if gated else torch.randn(d_model))

    matrices = 3 if gated else 2
    heavy, light = int(d_ff * HEAVY), d_ff - int(d_ff * HEAVY)
    budget = KEEP * matrices * d_model * d_ff
    rank = round((budget / matrices - d_model * heavy) / (d_model + light) / ALIGN) * ALIGN
    split = ffn(branch(heavy, dense), branch(light, partial(low_rank, rank)))
    width = round(split.spec.parameters / (matrices * d_model + (0 if gated else 1)))
    return {
        "dense": ffn(branch(d_ff, dense)),
        "int8": ffn(branch(d_ff, int8)),
        "int8 codes in groups": ffn(branch(d_ff, partial(packed, 8))),
        "int4": ffn(branch(d_ff, partial(packed, 4))),
        "int4 in groups of 256": ffn(branch(d_ff, partial(packed, 4, group=256))),
        "int2": ffn(branch(d_ff, partial(packed, 2))),
        "int8 heavy + int4": ffn(branch(heavy, partial(packed, 8)), branch(light, partial(packed, 4))),
        "split low rank": split,
        "pruned": ffn(branch(width, dense)),
    }


def ffn_rows(rounds: int, clock: Clock) -> Iterator[dict[str, Any]]:
    flush = np.ones(FLUSH_BYTES // 4, dtype=np.float32)  # zeros would be one page, read again and again
    for d_model, d_ff, gated in SHAPES:
        torch.manual_seed(0)
        made = sums(d_model, d_ff, gated)
        x = torch.randn(1, max(TOKENS), d_model)
        parameters = {name: ffn.spec.parameters for name, ffn in made.items()}
        with torch.no_grad(), reference_only():
            answers = {name: ffn(x) for name, ffn in made.items()}
        running = {name: _session(exportable(ffn), d_model) for name, ffn in made.items()}
        off = {name: _off(run, x, answers[name]) for name, run in running.items()}
        for tokens in TOKENS:
            measures = [
                partial(_seconds, clock, run, x[:, :tokens], flush if tokens == 1 else None) for run in running.values()
            ]
            times = dict(zip(running, medians(measures, rounds, warmup=3), strict=True))
            for name, seconds in times.items():
                yield {
                    "d_model": d_model,
                    "d_ff": d_ff,
                    "gated": gated,
                    "tokens": tokens,
                    "row": name,
                    "parameters": parameters[name],
                    "milliseconds": seconds * 1e3,
                    "times_dense": times["dense"] / seconds,
                    "goal": GOALS.get((name, tokens)),
                    "off_torch": off[name],
                    **_beside_pruned(name, d_model, tokens, seconds / times["pruned"]),
                }


def _beside_pruned(name: str, d_model: int, tokens: int, ratio: float) -> dict[str, Any]:
    if name != "split low rank":
        return {}
    return {"over_pruned": ratio, "over_pruned_limit": LIMITS.get((d_model, tokens))}


def encoder_rows(rounds: int, clock: Clock) -> Iterator[dict[str, Any]]:
    """MiniLM-L6 as it is and compressed on the built-in text, exported by the same function."""
    ids = torch.randint(1000, 30000, (1, 128), generator=torch.Generator().manual_seed(0)).numpy()
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    with tempfile.TemporaryDirectory() as folder:
        running = {"dense": _encoder(str(minilm()), Path(folder) / "dense")}
        for name, method in RECIPES.items():
            source = open_source(str(minilm()))
            recipe = {"method": method, "calibration": {"samples": 32, "seq_len": 128}}
            result = ffsplit.compress(source.load(), source.tokenizer(), recipe=recipe, device="cpu")
            saved = ffsplit.save(result, Path(folder) / f"{name} checkpoint")
            running[name] = _encoder(str(saved.directory), Path(folder) / name)
        times = dict(
            zip(running, medians([partial(_run, clock, run, feed) for run in running.values()], rounds, 3), strict=True)
        )
    for name, seconds in times.items():
        yield {"row": name, "milliseconds": seconds * 1e3, "times_dense": times["dense"] / seconds}


def _encoder(model: str, out: Path) -> Any:
    return session(export_onnx(model, out).directory / GRAPH, threads=1)


def _session(ffn: nn.Module, d_model: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        trace_module(ffn, torch.randn(2, 3, d_model), Path(folder) / GRAPH)
        return session(Path(folder) / GRAPH, threads=1)


def _off(run: Any, x: Tensor, expected: Tensor) -> float:
    found = torch.from_numpy(run.run(None, {run.get_inputs()[0].name: x.numpy()})[0])
    return float((found - expected).norm() / expected.norm())


def _seconds(clock: Clock, run: Any, x: Tensor, flush: np.ndarray[Any, Any] | None) -> float:
    if flush is not None:
        flush.sum()
    return _run(clock, run, {run.get_inputs()[0].name: x.contiguous().numpy()})


def _run(clock: Clock, run: Any, feed: dict[str, Any]) -> float:
    start = clock()
    run.run(None, feed)
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu leaves out the time in which other programs had the core",
    )
    parser.add_argument("--only", choices=["ffn", "encoder"])
    parser.add_argument("--out", default="onnx-cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = os.getloadavg()
    parts: dict[str, list[dict[str, Any]]] = {}
    for part, rows in (("ffn", ffn_rows), ("encoder", encoder_rows)):
        if options.only in (None, part):
            parts[part] = []
            for row in rows(options.rounds, CLOCKS[options.clock]):
                parts[part].append(row)
                print(row, flush=True)
    content = {
        "provenance": provenance(seed=0),
        "packages": {package: metadata.version(package) for package in PACKAGES},
        "load_average": {"before": before, "after": os.getloadavg()},
        "rounds": options.rounds,
        "clock": options.clock,
        "threads": 1,
        "model": "all-MiniLM-L6-v2",
        **parts,
    }
    print(write_result(options.out, content))


if __name__ == "__main__":
    main()
