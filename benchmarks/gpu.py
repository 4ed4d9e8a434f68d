"""FFNs on one NVIDIA GPU: dense, split and low-bit, side by side with what else multiplies by 4-bit codes.

Weights are random (time does not depend on them), in bfloat16; every product reads weights that are not in the cache
(copies take turns until they exceed it); whole FFNs run in CUDA graphs, all variants interleaved, medians of rounds.
Each variant is compared with its float64 reference before it is timed.

    python benchmarks/gpu.py [--out benchmarks/results/gpu.json] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _glue_variants import planned
from ffsplit.ffn.made_up import fill
from ffsplit.ffn.projections import Dense, Packed, Projection
from ffsplit.ffn.selectors import Threshold, ThresholdSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import Branch, SumFFN
from ffsplit.kernels.float8_ffn import set_prefill
from ffsplit.kernels.low_bit import MOST_TOKENS
from ffsplit.kernels.threshold import MOST_TOKENS as MOST_THRESHOLDED
from ffsplit.ops.rounding import Grid
from ffsplit.provenance import provenance

GROUP = 128
# (d_model, d_ff, gated, neurons of the heavy branch)
SHAPES = [(4096, 11008, True, 1152), (8192, 28672, True, 2816), (4096, 16384, False, 1664)]
TOKENS = (1, 4, 16, 64, 256, 2048, 8, 32, 33, 512, 1024, 8192)
BEYOND_CACHE = 150e6
ROUNDS = 7
CATS = "cats 50 %"
# Half of the parameters in fewer neurons, and in a tenth of the neurons beside a low-rank rest.
SMALLER = {"pruned 0.5": "prune", "split low rank 0.5": "ffsplit"}
KEEP, ALIGN = 0.5, 64
Call = Callable[[Tensor], Tensor]
T = TypeVar("T")


def stored(rows: int, columns: int, bits: int) -> Projection:
    """A random matrix whose products have the size of their inputs."""
    if bits == 16:
        return Dense((torch.randn(rows, columns, device="cuda") * columns**-0.5).to(torch.bfloat16))
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device="cuda")
    groups = columns // GROUP
    scale = (torch.rand(rows, groups, device="cuda") + 0.5) * columns**-0.5 / 2 ** (bits - 2)
    zero = torch.randint(2 ** (bits - 1) - 1, 2 ** (bits - 1) + 1, (rows, groups), dtype=torch.uint8, device="cuda")
    return Packed.from_codes(codes, Grid(scale.half(), zero, GROUP), bits=bits, group=GROUP)


def split_ffn(d_model: int, parts: list[tuple[int, int]], gated: bool) -> SumFFN:
    """Branches of so many neurons in so many bits each."""
    act = nn.SiLU() if gated else nn.GELU(approximate="tanh")
    branches = [
        Branch(
            act,
            stored(neurons, d_model, bits),
            stored(d_model, neurons, bits),
            stored(neurons, d_model, bits) if gated else None,
        )
        for neurons, bits in parts
    ]
    return SumFFN(d_model, branches).eval()


def smaller_spec(d_model: int, d_ff: int, gated: bool, way: str) -> SumSpec:
    """The structure of a way of ``glue.py`` at :data:`KEEP`."""
    return planned(FFNShape(d_model, d_ff, gated), way, KEEP, ALIGN)


def smaller_ffn(d_model: int, spec: SumSpec, gated: bool) -> SumFFN:
    """Made-up numbers in a structure, in bfloat16."""
    act = nn.SiLU() if gated else nn.GELU(approximate="tanh")
    found = SumFFN.empty(spec, act, torch.bfloat16, torch.device("cuda"))
    fill(found)
    return found.eval()


def thresholded_ffn(d_model: int, d_ff: int, gated: bool) -> SumFFN:
    """One dense branch, half of whose neurons a token leaves out."""
    ffn = split_ffn(d_model, [(d_ff, 16)], gated)
    (branch,) = ffn._branches()
    compared = branch.gate or branch.up
    activations = branch.act(compared(torch.randn(64, d_model, device="cuda", dtype=torch.bfloat16))).abs()
    spec = ThresholdSpec(neurons=d_ff, shared=True, sparsity=0.5)
    branch.selector = Threshold(spec, activations.float().median().bfloat16().view(1))
    return ffn


def sizes(d_model: int, d_ff: int, gated: bool) -> list[tuple[int, int]]:
    """Rows and columns of up, down and gate."""
    return [(d_ff, d_model), (d_model, d_ff), *([(d_ff, d_model)] if gated else [])]


def through(x: Tensor, up: Call, down: Call, gate: Call | None = None) -> Tensor:
    """An FFN of anybody's products."""
    return down(F.gelu(up(x), approximate="tanh") if gate is None else F.silu(gate(x)) * up(x))


class DenseFFN(nn.Module):
    """As transformers computes it; its time on the host is measured, so nothing stands between."""

    def __init__(self, d_model: int, d_ff: int, gated: bool) -> None:
        super().__init__()
        self.weights = [
            (torch.randn(*size, device="cuda") * size[1] ** -0.5).to(torch.bfloat16)
            for size in sizes(d_model, d_ff, gated)
        ]

    def forward(self, x: Tensor) -> Tensor:
        up, down, *gate = self.weights
        hidden = F.silu(F.linear(x, gate[0])) * F.linear(x, up) if gate else F.gelu(F.linear(x, up), approximate="tanh")
        return F.linear(hidden, down)


class TorchInt4(nn.Module):
    """torch's own kernel for 4-bit codes in groups."""

    def __init__(self, d_model: int, d_ff: int, gated: bool) -> None:
        super().__init__()
        self.matrices = [self._matrix(*size) for size in sizes(d_model, d_ff, gated)]

    def _matrix(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
        scales = torch.rand(columns // GROUP, rows, 2, device="cuda").to(torch.bfloat16) * columns**-0.5 / 4
        return torch._convert_weight_to_int4pack(codes, 8), scales

    def forward(self, x: Tensor) -> Tensor:
        def product(matrix: tuple[Tensor, Tensor]) -> Call:
            return lambda y: torch._weight_int4pack_mm(y, matrix[0], GROUP, matrix[1])

        return through(x, *map(product, self.matrices))


def gemlite_ffn(d_model: int, d_ff: int, gated: bool) -> nn.Module | None:
    """gemlite's layers, where gemlite is installed."""
    try:
        from gemlite import set_autotune
        from gemlite.core import DType, GemLiteLinearTriton
    except ImportError:
        return None

    set_autotune("fast")

    class GemliteFFN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(self._layer(*size) for size in sizes(d_model, d_ff, gated))

        def _layer(self, rows: int, columns: int) -> nn.Module:
            layer = GemLiteLinearTriton(4, GROUP, columns, rows, input_dtype=DType.BF16, output_dtype=DType.BF16)
            codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device="cuda")
            scales = (torch.rand(rows * columns // GROUP, 1, device="cuda") * columns**-0.5 / 4).to(torch.bfloat16)
            layer.pack(codes, scales, torch.full_like(scales, 8.0), None)
            return layer

        def forward(self, x: Tensor) -> Tensor:
            return through(x, *self.layers)

    return GemliteFFN()


def torchao_ffn(d_model: int, d_ff: int, gated: bool) -> nn.Module | None:
    """Linear layers that torchao has quantised to 4 bits, where torchao is installed and can do it here."""
    try:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_
    except ImportError:
        return None

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kind = {"bias": False, "device": "cuda", "dtype": torch.bfloat16}
            self.up, self.down = nn.Linear(d_model, d_ff, **kind), nn.Linear(d_ff, d_model, **kind)
            self.gate = nn.Linear(d_model, d_ff, **kind) if gated else None

        def forward(self, x: Tensor) -> Tensor:
            return through(x, self.up, self.down, self.gate)

    found = Layers()
    try:
        quantize_(found, Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d"))
    except (RuntimeError, ImportError, AssertionError, NotImplementedError) as error:
        print(f"torchao: {str(error)[:100]}", flush=True)
        return None
    return found


def reference_error(ffn: SumFFN, x: Tensor, run: Call) -> float:
    """Relative to float64."""
    exact = copy.deepcopy(ffn).double()(x.double())
    return float((run(x).double() - exact).norm() / exact.norm())


def captured(calls: list[Callable[[], Any]], repeats: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of calls that take turns, and how many there are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    count = max(1, repeats // len(calls)) * len(calls)
    with torch.cuda.graph(graph):
        for index in range(count):
            calls[index % len(calls)]()
    return graph, count


def interleaved(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]]) -> dict[str, float]:
    """Median seconds of one call of each, the variants taking turns in every round."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for round_number in range(ROUNDS + 1):
        for name, (graph, count) in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if round_number:
                times[name].append(start.elapsed_time(end) / count / 1e3)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def beyond_cache(make: Callable[[], T], size: float) -> list[T]:
    """As many as their weights, of so many bytes each, exceed the cache."""
    return [make() for _ in range(int(BEYOND_CACHE // size) + 1)]


def variants(d_model: int, d_ff: int, gated: bool, heavy: int) -> dict[str, tuple[list[nn.Module], int]]:
    """Modules that take turns, and bytes of the weights of one."""
    weights = (3 if gated else 2) * d_model * d_ff
    rest = d_ff - heavy

    def copies(make: Callable[[], nn.Module | None], size: float) -> tuple[list[nn.Module], int]:
        return [module for module in beyond_cache(make, size) if module is not None], int(size)

    share = heavy / d_ff
    smaller = {name: smaller_spec(d_model, d_ff, gated, way) for name, way in SMALLER.items()}
    found = {
        "dense bf16": copies(lambda: DenseFFN(d_model, d_ff, gated), 2 * weights),
        "int4": copies(lambda: split_ffn(d_model, [(d_ff, 4)], gated), weights * 4.19 / 8),
        "int3": copies(lambda: split_ffn(d_model, [(d_ff, 3)], gated), weights * 3.16 / 8),
        "ffsplit int8 10 % + int4": copies(
            lambda: split_ffn(d_model, [(heavy, 8), (rest, 4)], gated),
            weights * (share * 8.19 + (1 - share) * 4.19) / 8,
        ),
        "ffsplit bf16 10 % + int4": copies(
            lambda: split_ffn(d_model, [(heavy, 16), (rest, 4)], gated), weights * (share * 16 + (1 - share) * 4.19) / 8
        ),
        # What one token moves: all of the matrix that is compared with the threshold, half of the others.
        CATS: copies(lambda: thresholded_ffn(d_model, d_ff, gated), weights * (4 / 3 if gated else 3 / 2)),
        **{
            name: copies(partial(smaller_ffn, d_model, spec, gated), 2 * spec.parameters)
            for name, spec in smaller.items()
        },
        "torchao int4": copies(lambda: torchao_ffn(d_model, d_ff, gated), weights * 4.25 / 8),
        "torch int4": copies(lambda: TorchInt4(d_model, d_ff, gated), weights * 4.25 / 8),
        # gemlite searches for every new shape, which takes minutes: the first one only.
        "gemlite w4": copies(
            lambda: gemlite_ffn(d_model, d_ff, gated) if d_ff == SHAPES[0][1] else None, weights * 4.25 / 8
        ),
    }
    return {name: value for name, value in found.items() if value[0]}


def bandwidths(made: dict[str, tuple[list[nn.Module], int]], seconds: dict[str, float], tokens: int) -> dict[str, int]:
    """Gigabytes of weights a second, where tokens are so few that these are what takes time."""
    # Several tokens leave out less than half, by how much their neurons differ.
    known = [name for name in seconds if name in made and tokens <= (1 if name == CATS else 64)]
    return {name: round(made[name][1] / seconds[name] / 1e9) for name in known}


def promised(made: dict[str, tuple[list[nn.Module], int]], seconds: dict[str, float]) -> dict[str, float]:
    """How much of the speed that fewer multiplications promise is there."""
    dense = made["dense bf16"][1], seconds["dense bf16"]
    return {
        name: round(dense[1] / seconds[name] / (dense[0] / made[name][1]), 3) for name in SMALLER if name in seconds
    }


def measure(d_model: int, d_ff: int, gated: bool, heavy: int, tokens: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """One row for every number of tokens."""
    made = variants(d_model, d_ff, gated, heavy)
    for count in tokens:
        x = torch.randn(count, d_model, device="cuda", dtype=torch.bfloat16)
        graphs, errors = {}, {}
        for name, (modules, _) in made.items():
            # Beyond, they are far slower than the dense FFN; every new shape costs gemlite a search.
            if (name in ("torch int4", "torchao int4") and count > 256) or (
                name == "gemlite w4" and count not in (1, 16)
            ):
                continue
            if name == CATS and count > MOST_THRESHOLDED:
                continue
            # Many tokens: the decoded or float8 weights are the same for all codes; one split is enough.
            if count > MOST_TOKENS and name in ("int3", "ffsplit bf16 10 % + int4"):
                continue
            decoded = isinstance(modules[0], SumFFN) and name not in SMALLER and count > MOST_TOKENS
            for prefill in ("exact", "float8") if decoded else ("exact",):
                set_prefill(prefill)  # type: ignore[arg-type]
                label = name if prefill == "exact" else f"{name}, float8"
                if isinstance(modules[0], SumFFN) and count in (1, 4, 16, 256):
                    errors[label] = reference_error(modules[0], x[:256], modules[0])
                repeats = 24 if count <= 256 else 4
                try:
                    graphs[label] = captured([partial(module, x) for module in modules], repeats)
                except (RuntimeError, torch.AcceleratorError) as error:
                    print(f"{label} at {count} tokens: {str(error)[:100]}", flush=True)
        set_prefill("exact")
        seconds = interleaved(graphs)
        dense = seconds["dense bf16"]
        told = ", ".join(f"{name} x{dense / value:.2f}" for name, value in seconds.items() if name != "dense bf16")
        print(f"{d_model}/{d_ff} {count:5d} tokens: dense {dense * 1e6:.1f} us, {told}", flush=True)
        yield {
            "d_model": d_model,
            "d_ff": d_ff,
            "gated": gated,
            "tokens": count,
            "microseconds": {name: round(value * 1e6, 1) for name, value in seconds.items()},
            "times_dense": {name: round(dense / value, 2) for name, value in seconds.items()},
            "gigabytes_per_second": bandwidths(made, seconds, count),
            "share_of_promised": promised(made, seconds),
            "relative_error": errors,
        }


def eager_overhead() -> dict[str, float]:
    """Microseconds from call to call without a graph, at one token: what Python and the launches cost."""
    found = {}
    modules = {"dense bf16": DenseFFN(512, 1024, True), "int4": split_ffn(512, [(1024, 4)], True)}
    modules[CATS] = thresholded_ffn(512, 1024, True)
    x = torch.randn(1, 512, device="cuda", dtype=torch.bfloat16)
    for name, module in modules.items():
        for _ in range(20):
            module(x)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(500):
            module(x)
        torch.cuda.synchronize()
        found[name] = round((time.perf_counter() - started) / 500 * 1e6, 1)
    return found


@torch.inference_mode(False)
@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    parser.add_argument("--quick", action="store_true", help="one shape, few token counts")
    options = parser.parse_args()
    torch.manual_seed(0)
    shapes, tokens = (SHAPES[:1], (1, 4, 16, 256)) if options.quick else (SHAPES, TOKENS)
    rows: list[dict[str, Any]] = []
    document = {
        "benchmark": "gpu",
        "protocol": f"random bf16 weights beyond the cache, groups of {GROUP}, CUDA graphs, medians of {ROUNDS} rounds",
        "rows": rows,
        "eager_microseconds": eager_overhead(),
        "provenance": provenance(seed=0, data={}),
        "device": torch.cuda.get_device_name(),
    }
    print(f"{document['device']}; eager, us a call: {document['eager_microseconds']}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        for row in measure(*shape, tokens):
            rows.append(row)
            options.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
