"""Whole models, dense against FFSplit: SmolLM2-135M on the CPU, and a Llama of 7B shapes with random weights on a GPU.

    python benchmarks/end_to_end.py cpu [--only PATTERN] [--rounds 5]
    python benchmarks/end_to_end.py gpu [--layers 32] [--rounds 7]

``cpu`` compresses SmolLM2 without calibration (its structure decides a model's speed, not the numbers in it) and puts
each checkpoint on the bench of ``ffsplit bench``, against the GGUF file. ``gpu`` fills structures with random codes.
Both write ``benchmarks/results/end-to-end-*.json`` after every measurement.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import ffsplit
from _common import smollm2, write_result
from ffsplit.bench.fillings import Variant, filled, own, without_ffns
from ffsplit.bench.graphs import can_capture
from ffsplit.bench.memory import resident_bytes, stored_bytes
from ffsplit.bench.roofline import measure_roofline
from ffsplit.bench.run import bench
from ffsplit.bench.static_decode import StaticDecode
from ffsplit.bench.whole import PhaseTiming, made_up_ids, time_decode, time_prefill
from ffsplit.families.find import find_ffns
from ffsplit.ffn.made_up import fill
from ffsplit.ffn.projections import PackedSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.budgets import one_branch_spec, packed_branch_spec, sum_spec
from ffsplit.plain import plain
from ffsplit.provenance import provenance

CPU_TOKENS = (1, 16, 512)
# 576 inputs are no multiple of 128.
NO_DATA = {"rounding": "rtn", "refit": False, "polish": 0, "group": 64}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "int4": {"method": "quantize", "code_bits": 4, **NO_DATA},
    "ffsplit-int8-int4": {
        "method": "ffsplit", "bits": 8, "heavy": 0.125, "heavy_bits": 8, "rest_bits": 4, "rest": "rtn", "refit": False,
        "score": "magnitude", "group": 64,
    },
    "w8a8": {"method": "w8a8"},
    "prune-0.5": {"method": "prune", "keep": 0.5, "score": "magnitude", "refit": False},
}  # fmt: skip
SEVEN_B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
           "vocab_size": 32000, "max_position_embeddings": 4096}  # fmt: skip
GROUP, HEAVY_NEURONS = 128, 1152
"""Heavy neurons in whole groups: 10.5 % of 11,008."""
PREFILL, BATCHES = 2048, (1, 16)
PROMPT, NEW_TOKENS = 128, 32
LARGEST_ERROR = 0.1


def on_cpu(only: str, rounds: int, out: str) -> None:
    """Every checkpoint through ``ffsplit bench``."""
    dense = str(smollm2())
    content: dict[str, Any] = {"protocol": {"tokens": CPU_TOKENS, "rounds": rounds, "dense": Path(dense).name},
                               "provenance": _provenance(), "checkpoints": {}}  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        for name, method in CHECKPOINTS.items():
            if not re.search(only, name):
                continue
            folder = Path(work) / name
            ffsplit.compress(dense, {"method": method}, device="cpu").save(folder)
            found = bench(str(folder), against=dense, tokens=CPU_TOKENS, device="cpu", rounds=rounds)
            content["checkpoints"][name] = plain(
                {"method": method, **found.to_dict(), "model": name, "against": "dense"}
            )
            _say(name, found.phases)
            write_result(out, content)


def on_gpu(device: torch.device, layers: int, rounds: int, out: str, sizes: dict[str, int]) -> None:
    """Dense, FFSplit and uniform int4 in one model: prefill, decode at batch 1 and 16."""
    started = time.perf_counter()
    model = random_llama(device, layers, sizes)
    sites = find_ffns(model).sites
    specs = structures(FFNShape(sites[0].d_model, sites[0].d_ff, gated=True))
    variants = {"dense": own(model, sites)}
    for name, spec in specs.items():
        variants[name] = filled(model, sites, _maker(model, spec))
    variants["none"] = without_ffns(model, sites)
    content: dict[str, Any] = {
        "protocol": {"sizes": {**sizes, "layers": layers}, "dtype": "bfloat16", "rounds": rounds, "group": GROUP,
                     "prompt": PROMPT, "new_tokens": NEW_TOKENS, "weights": "random"},
        "provenance": _provenance(),
        "roofline": asdict(measure_roofline(device, torch.bfloat16)),
        "structures": {name: spec.describe() for name, spec in specs.items()},
        "errors": {name: kernel_errors(model, spec) for name, spec in specs.items()},
        "phases": [],
    }  # fmt: skip
    write_result(out, content)
    _refuse_wrong(content["errors"])
    content["same_tokens"] = {name: same_tokens(variant) for name, variant in variants.items()}
    write_result(out, content)
    measures: list[Callable[[], PhaseTiming]] = [
        lambda batch=batch: time_decode(
            variants, batch, rounds, 1, time.perf_counter, prompt=PROMPT, new_tokens=NEW_TOKENS
        )
        for batch in BATCHES
    ]
    measures.append(
        lambda: time_prefill(variants, min(PREFILL, sizes["max_position_embeddings"]), rounds, 1, time.perf_counter)
    )
    for measure in measures:
        phase = measure()
        content["phases"].append(_phase(phase))
        content["seconds"] = time.perf_counter() - started
        write_result(out, plain(content))
        _say("gpu", [phase])
    content["bytes"] = {name: _bytes(variant) for name, variant in variants.items()}
    content["seconds"] = time.perf_counter() - started
    print(f"wrote {write_result(out, plain(content))} after {content['seconds']:.0f} s")


def random_llama(device: torch.device, layers: int, sizes: dict[str, int]) -> PreTrainedModel:
    """A Llama with the initial weights of its class, made on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, **sizes)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False).eval()


def structures(shape: FFNShape) -> dict[str, SumSpec]:
    """The FFSplit mixture, and uniform int4 beside it."""
    heavy = min(HEAVY_NEURONS, shape.d_ff // 4)
    branches = [
        packed_branch_spec(shape, heavy, bits=8, group=GROUP),
        packed_branch_spec(shape, shape.d_ff - heavy, bits=4, group=GROUP),
    ]
    uniform = one_branch_spec(shape, lambda size: PackedSpec(shape=size, bits=4, group=GROUP))
    return {"ffsplit": sum_spec(shape, branches, bias=False), "int4": uniform}


def kernel_errors(model: PreTrainedModel, spec: SumSpec) -> dict[str, float]:
    """Relative error of a structure's forward against its decoded weights in float32, by number of tokens."""
    module = _maker(model, spec)(None)
    weights = module.to_weights(torch.float32)
    errors = {}
    for tokens in (1, 3, *BATCHES, 129, PREFILL):
        x = torch.randn(tokens, spec.d_model, device=model.device, dtype=model.dtype)
        with torch.inference_mode():
            wanted, found = weights(x.float()), module(x).float()
        errors[str(tokens)] = float((found - wanted).norm() / wanted.norm())
    return errors


def same_tokens(variant: Variant) -> float | None:
    """Share of tokens that the recorded graph decodes as the same steps without it do."""
    model = variant.ready()
    if not can_capture(model.device):
        return None
    with torch.inference_mode():
        eager, graph = (StaticDecode(model, made_up_ids(2, PROMPT), 8, graph=graph).tokens() for graph in (False, True))
    return float((eager == graph).float().mean())


def _maker(model: PreTrainedModel, spec: SumSpec) -> Callable[[Any], SumFFN]:
    def make(_site: Any) -> SumFFN:
        module = SumFFN.empty(spec, nn.SiLU(), model.dtype, model.device)
        fill(module)
        return module.requires_grad_(False).eval()

    return make


def _refuse_wrong(errors: dict[str, dict[str, float]]) -> None:
    wrong = {name: its for name, its in errors.items() if not max(its.values()) < LARGEST_ERROR}
    if wrong:
        raise SystemExit(f"wrong results, so nothing is timed: {wrong}")


def _bytes(variant: Variant) -> dict[str, int]:
    model = variant.ready()
    return {"stored": stored_bytes(model), "held": resident_bytes(model)}


def _phase(phase: PhaseTiming) -> dict[str, Any]:
    dense = phase.seconds["dense"]
    return {
        **asdict(phase),
        "speeds": {name: dense / seconds for name, seconds in phase.seconds.items()},
        "tokens_per_second": {name: phase.tokens_per_second(name) for name in phase.seconds},
        "ffn_share": phase.ffn_share,
        "limit": phase.limit,
    }


def _provenance() -> dict[str, Any]:
    return {**provenance(seed=0), "load_average": list(os.getloadavg())}


def _say(name: str, phases: Any) -> None:
    for phase in phases:
        speeds = ", ".join(
            f"{key} {1e3 * s:.3f} ms (x{phase.seconds['dense'] / s:.2f})" for key, s in phase.seconds.items()
        )
        print(f"{name}: {phase.phase} {phase.tokens}{' (graph)' if phase.graph else ''}: {speeds}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("cpu", "gpu"))
    parser.add_argument("--only", default="", help="of the checkpoints on the CPU: a pattern")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script without a GPU")
    parser.add_argument("--out", help="name of the result, without .json")
    given = parser.parse_args()
    if given.part == "cpu":
        on_cpu(given.only, given.rounds, given.out or "end-to-end-cpu")
        return
    small = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4,
             "vocab_size": 128, "max_position_embeddings": 256}  # fmt: skip
    sizes = small if given.tiny else SEVEN_B
    on_gpu(torch.device(given.device), given.layers, given.rounds, given.out or "end-to-end-gpu", sizes)


if __name__ == "__main__":
    main()
