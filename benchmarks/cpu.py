"""FFNs and SmolLM2-135M on one thread of a CPU: this package's storages beside dense ones and what torch itself offers.

Every number is the median of turns taken in one process, the last cache emptied before each forward of a single FFN.
The clock is the CPU time of the one thread, which leaves out the time that other processes take from it (what they take
of the memory's bandwidth is in). Weights are made up: no quality is measured here, and structures are those that
recipes give.

    python benchmarks/cpu.py [--only ffn|model] [--rounds 9]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from _common import read_results, smollm2, write_result
from _cpu_peers import torchs_own
from ffsplit.bench.caches import Flush
from ffsplit.bench.fillings import Variant, filled, own
from ffsplit.bench.latency import decode_seconds, prefill_seconds
from ffsplit.families import find_ffns
from ffsplit.ffn.made_up import fill
from ffsplit.ffn.projections import DenseSpec, Int8DynamicSpec, StorageSpec
from ffsplit.ffn.selectors import ThresholdSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import BranchSpec, SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.kernels.cache import decoded_room
from ffsplit.kernels.dispatch import reference_only
from ffsplit.methods.budgets import (
    dense_branch_spec,
    low_rank_branch_spec,
    one_branch_spec,
    packed_branch_spec,
    sum_spec,
)
from ffsplit.pipeline.load import open_source
from ffsplit.provenance import provenance
from ffsplit.timing import medians

SEED = 0
SHAPES = {
    "2048/5632 gated": FFNShape(2048, 5632, gated=True),
    "768/3072 plain": FFNShape(768, 3072, gated=False, up_bias=True, down_bias=True),
}
CATS = "cats 50 %"
TOKENS = (1, 4, 16, 64, 128, 512, 1024)
GROUP = 64
HEAVY_LOW_RANK, HEAVY_INT8, KEEP = 0.1, 0.25, 0.5
KERNEL_TOKENS = 128
"""Above these a kernel for few tokens takes seconds and tells nothing new."""
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def structures(shape: FFNShape) -> dict[str, SumSpec]:
    """What is timed, by name; the split and the pruned FFN have the same number of parameters."""
    heavy = round(HEAVY_LOW_RANK * shape.d_ff) // 16 * 16
    light = shape.d_ff - heavy
    left = int(KEEP * shape.weights) - heavy * shape.matrices * shape.d_model
    rank = left // (shape.matrices * (shape.d_model + light)) // 16 * 16
    width = heavy + rank * (shape.d_model + light) // shape.d_model
    int8 = round(HEAVY_INT8 * shape.d_ff) // GROUP * GROUP

    def packed(neurons: int, bits: int) -> BranchSpec:
        return packed_branch_spec(shape, neurons, bits, GROUP)

    def total(*branches: BranchSpec) -> SumSpec:
        return sum_spec(shape, list(branches), bias=shape.down_bias)

    return {
        "dense": one_branch_spec(shape, lambda size: DenseSpec(shape=size)),
        "pruned 0.5": total(dense_branch_spec(shape, width)),
        "split low rank 0.5": total(dense_branch_spec(shape, heavy), low_rank_branch_spec(shape, light, rank)),
        "int4": total(packed(shape.d_ff, 4)),
        "int3": total(packed(shape.d_ff, 3)),
        "int8": total(packed(shape.d_ff, 8)),
        "25% int8 + int4": total(packed(int8, 8), packed(shape.d_ff - int8, 4)),
        "w8a8": one_branch_spec(shape, lambda size: Int8DynamicSpec(shape=size)),
        CATS: thresholded(shape, 0.5),
    }


def thresholded(shape: FFNShape, skipped: float) -> SumSpec:
    """All neurons dense, of which a token leaves out this share."""
    selector = ThresholdSpec(neurons=shape.d_ff, shared=True, sparsity=skipped)
    return sum_spec(
        shape,
        [dense_branch_spec(shape, shape.d_ff).model_copy(update={"selector": selector})],
        bias=shape.down_bias,
    )


def made(spec: SumSpec, gated: bool, dtype: torch.dtype) -> SumFFN:
    """A sum of this structure with made-up numbers."""
    ffn = SumFFN.empty(spec, nn.SiLU() if gated else nn.GELU(), dtype, "cpu").requires_grad_(False).eval()
    fill(ffn)
    for branch in ffn.branches:
        if branch.selector is not None:
            branch.selector.threshold.fill_(threshold(branch))
    return ffn


def threshold(branch: nn.Module) -> float:
    """At which random inputs leave out the share of a branch's neurons that its selector promises."""
    compared = branch.up if branch.gate is None else branch.gate
    bias = branch.up_bias if branch.gate is None else branch.gate_bias
    found = compared(torch.randn(64, compared.weight.shape[1]).to(compared.weight))
    activations = branch.act(found if bias is None else found + bias).abs().float()
    return float(activations.flatten().kthvalue(round(branch.selector.spec.sparsity * activations.numel())).values)


class Reference(nn.Module):
    """A sum as it was without any kernel: decoded at every forward."""

    def __init__(self, ffn: SumFFN) -> None:
        super().__init__()
        self.ffn = deepcopy(ffn)

    def forward(self, x: Tensor) -> Tensor:
        with reference_only():
            return self.ffn(x)


def candidates(shape: FFNShape) -> dict[str, tuple[nn.Module, torch.dtype, int]]:
    """Modules by name, the dtype of their input, and up to how many tokens they are timed."""
    found: dict[str, tuple[nn.Module, torch.dtype, int]] = {}
    everything = max(TOKENS)
    for short, dtype in FLOATS.items():
        for name, spec in structures(shape).items():
            few = 4 if name == CATS else everything  # beyond one token it is a dense FFN and a mask
            found[f"{name}, {short}"] = made(spec, shape.gated, dtype), dtype, few
    dense, int4 = found["dense, fp32"][0], found["int4, fp32"][0]
    found["int4 decoded at every forward, fp32"] = Reference(int4), torch.float32, KERNEL_TOKENS
    for name, module in torchs_own(dense, int4).items():
        fp32 = name.endswith("fp32")
        found[name] = module.eval(), FLOATS["fp32" if fp32 else "bf16"], everything if fp32 else KERNEL_TOKENS
    return found


def time_shape(shape: FFNShape, rounds: int, flush: Callable[[], None]) -> dict[str, dict[str, float]]:
    """Milliseconds by tokens and name."""
    modules = candidates(shape)
    times: dict[str, dict[str, float]] = {}
    for tokens in TOKENS:
        timed = {name: (module, dtype) for name, (module, dtype, most) in modules.items() if tokens <= most}
        measures = [
            partial(once, module, torch.randn(tokens, shape.d_model).to(dtype), flush)
            for module, dtype in timed.values()
        ]
        few = max(3, rounds if tokens <= KERNEL_TOKENS else rounds // 3)
        found = medians(measures, few, warmup=1)
        times[str(tokens)] = {name: 1e3 * seconds for name, seconds in zip(timed, found, strict=True)}
    return times


def once(module: nn.Module, x: Tensor, flush: Callable[[], None]) -> float:
    """CPU seconds of a forward with nothing in the cache but its input."""
    flush()
    x = x.clone()
    started = time.thread_time()
    module(x)
    return time.thread_time() - started


def ratios(times: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """How many times faster than dense everything is, and how close to the best that torch offers."""
    speed = {
        tokens: {
            name: {f"over {base}": row[base] / value for base in ("dense, fp32", "dense, bf16")}
            for name, value in row.items()
        }
        for tokens, row in times.items()
    }
    return {"speed": speed, "of_the_best_of_torch": {tokens: of_the_best(row) for tokens, row in times.items()}}


def of_the_best(row: Mapping[str, float]) -> dict[str, float]:
    """Best time of torch for a storage, over ours: at least 0.95 is wanted.

    For weight-only int4 torch has its kernel and the dense product of decoded weights, in either dtype; for int8 in
    groups only the latter (its weight-only int8 kernel wants one scale a row).
    """

    def best(names: Iterable[str]) -> float:
        return min(row[name] for name in names if name in row)

    dense = ["dense, fp32", "dense, bf16"]
    int4, dynamic = [*dense, "torch int4 kernel, bf16"], ["torch quantize_dynamic int8, fp32"]
    own = {"int4": int4, "int3": int4, "w8a8": dynamic}
    found = {f"{name}, {short}": best(them) / row[f"{name}, {short}"] for name, them in own.items() for short in FLOATS}
    return found | {f"int8, {short}": best([f"dense, {short}"]) / row[f"int8, {short}"] for short in FLOATS}


def splits(times: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Time of the split FFN over that of the pruned one of as many parameters."""
    return {
        tokens: {s: row[f"split low rank 0.5, {s}"] / row[f"pruned 0.5, {s}"] for s in FLOATS}
        for tokens, row in times.items()
    }


def time_ffns(rounds: int) -> dict[str, Any]:
    flush = Flush(torch.device("cpu"))
    found: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        before = os.getloadavg()
        times = time_shape(shape, rounds, flush)
        described = {structure: _described(spec) for structure, spec in structures(shape).items()}
        found[name] = {
            "structures": described,
            "milliseconds": times,
            **ratios(times),
            "split_over_pruned": splits(times),
            "load_average": {"before": before, "after": os.getloadavg()},
        }
    return found


def _described(spec: SumSpec) -> dict[str, Any]:
    storages: list[StorageSpec] = [projection for branch in spec.branches for projection in branch.projections]
    return {
        "branches": [branch.describe() for branch in spec.branches],
        "parameters": sum(storage.parameters for storage in storages),
        "stored_megabytes_fp32": sum(storage.stored_bits(32) for storage in storages) / 8e6,
        "stored_megabytes_bf16": sum(storage.stored_bits(16) for storage in storages) / 8e6,
    }


def time_model(rounds: int) -> dict[str, Any]:
    """SmolLM2 with made-up FFNs, decode after 32 tokens and prefill of 128 and 512."""
    source = open_source(str(smollm2()))
    variants: dict[str, Variant] = {}
    wanted = ("pruned 0.5", "split low rank 0.5", "25% int8 + int4", "int4", "w8a8")
    for short, dtype in FLOATS.items():
        model = source.load(dtype).eval().requires_grad_(False)
        sites = find_ffns(model).sites
        shape = FFNShape(576, 1536, gated=True)
        variants[f"dense, {short}"] = own(model, sites)
        for name in wanted:
            spec = structures(shape)[name]
            variants[f"{name}, {short}"] = filled(model, sites, lambda _site, s=spec, d=dtype: made(s, True, d))
    before = os.getloadavg()
    found = {
        f"prefill {tokens}": _turns(
            variants, partial(prefill_seconds, window=_window(tokens), clock=time.thread_time), 3
        )
        for tokens in (128, 512)
    }
    start = _window(32)
    decode = partial(decode_seconds, prompt=start, new_tokens=16, clock=time.thread_time)
    found["decode"] = _turns(variants, decode, max(3, rounds // 2))
    return {
        "milliseconds": found,
        "speed": {
            what: {
                name: {f"over {base}": row[base] / value for base in ("dense, fp32", "dense, bf16")}
                for name, value in row.items()
            }
            for what, row in found.items()
        },
        "load_average": {"before": before, "after": os.getloadavg()},
        "model": provenance(variants["dense, fp32"].ready(), seed=SEED)["model"],
    }


def _window(tokens: int) -> Tensor:
    return torch.randint(0, 40_000, (1, tokens), generator=torch.Generator().manual_seed(SEED))


def _turns(variants: Mapping[str, Variant], seconds: Callable[[Any], float], rounds: int) -> dict[str, float]:
    measures = [lambda variant=variant: seconds(variant.ready()) for variant in variants.values()]
    return {name: 1e3 * value for name, value in zip(variants, medians(measures, rounds, warmup=1), strict=True)}


def described() -> dict[str, Any]:
    """What it takes to repeat a run."""
    return {
        "provenance": provenance(seed=SEED),
        "clock": "CPU seconds of one thread",
        "group": GROUP,
        "cpu": dict(torch.cpu.get_capabilities()),
        "decoded_room_bytes": decoded_room(torch.device("cpu")),
    }


def parser_of(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """With what every benchmark on one thread can be told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def on_one_thread() -> None:
    """From here on, with the numbers of the same seed."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)


def main() -> None:
    parser = parser_of(__doc__, rounds=9)
    parser.add_argument("--only", choices=("ffn", "model"))
    parser.add_argument("--out", default="cpu", help="name of the results file")
    options = parser.parse_args()
    on_one_thread()
    content = next(read_results(f"{options.out}.json"), {}) | described()
    with torch.no_grad():  # modules made in inference mode could not keep anything
        if options.only != "model":
            content["ffn"] = time_ffns(options.rounds)
        if options.only != "ffn":
            content["smollm2"] = time_model(options.rounds)
    write_result(options.out, content)


if __name__ == "__main__":
    main()
