"""Whole models, dense against FFSplit: SmolLM2-135M on the CPU, and a Llama of 7B shapes with random weights on a GPU.

    python benchmarks/end_to_end.py cpu [--rounds 3]
    python benchmarks/end_to_end.py gpu [--rounds 7]

The compressed FFNs get made-up numbers, without calibration: the structure decides how fast a model is, not the numbers
in it. Dense, compressed and empty FFNs take turns in one model, through the code of ``ffsplit bench``. Results are
written to ``benchmarks/results/end-to-end-*.json`` after every measurement.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from _common import smollm2, write_result
from ffsplit.bench.fillings import Variant, filled, own, without_ffns
from ffsplit.bench.graphs import can_capture
from ffsplit.bench.memory import resident_bytes, stored_bytes
from ffsplit.bench.roofline import measure_roofline
from ffsplit.bench.static_decode import StaticDecode
from ffsplit.bench.whole import PhaseTiming, made_up_ids, time_decode, time_prefill
from ffsplit.families.find import find_ffns
from ffsplit.ffn.made_up import fill
from ffsplit.ffn.projections import Int8DynamicSpec, PackedSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.kernels.dispatch import reference_only
from ffsplit.methods.budgets import dense_branch_spec, one_branch_spec, packed_branch_spec, sum_spec
from ffsplit.pipeline.load import open_source
from ffsplit.plain import plain
from ffsplit.provenance import hash_model, provenance

SEVEN_B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
           "vocab_size": 32000, "max_position_embeddings": 4096}  # fmt: skip
TINY = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4,
        "vocab_size": 128, "max_position_embeddings": 256}  # fmt: skip
LARGEST_ERROR = 0.1


@dataclass(frozen=True)
class Part:
    """What is measured on one machine.

    Attributes:
        name: of the result.
        group: of low-bit codes; SmolLM2's 576 inputs are no multiple of 128.
        heavy: neurons in int8, whole groups of them: about a tenth.
        prefills: tokens.
        batches: sequences that are decoded at a time.
        prompt: tokens before those that are decoded.
        new_tokens: decoded a turn.
    """

    name: str
    group: int
    heavy: int
    prefills: tuple[int, ...]
    batches: tuple[int, ...]
    prompt: int
    new_tokens: int


PARTS = {
    "cpu": Part("end-to-end-cpu", 64, 192, (16, 128, 512), (1, 16), 32, 16),
    "gpu": Part("end-to-end-gpu", 128, 1152, (2048,), (1, 16), 128, 32),
    "tiny": Part("end-to-end-tiny", 32, 64, (64,), (1, 4), 16, 4),
}


def measure(model: PreTrainedModel, part: Part, specs: dict[str, SumSpec], rounds: int, out: str, about: Any) -> None:
    """Correctness, then decode and prefill of dense, compressed and empty FFNs in turns."""
    started = time.perf_counter()
    sites = find_ffns(model).sites
    content: dict[str, Any] = {
        "model": about,
        "protocol": {**asdict(part), "rounds": rounds, "dtype": str(model.dtype), "device": model.device.type},
        "provenance": {**provenance(seed=0), "load_average": list(os.getloadavg())},
        "structures": {name: spec.describe() for name, spec in specs.items()},
        "roofline": asdict(measure_roofline(model.device, model.dtype)),
        "errors": {name: kernel_errors(model, spec, part) for name, spec in specs.items()},
        "phases": [],
    }
    write_result(out, plain(content))
    wrong = {name: its for name, its in content["errors"].items() if not max(its.values()) < LARGEST_ERROR}
    if wrong:
        raise SystemExit(f"wrong results, so nothing is timed: {wrong}")
    variants = {"dense": own(model, sites)}
    variants |= {name: filled(model, sites, _maker(model, spec)) for name, spec in specs.items()}
    variants["none"] = without_ffns(model, sites)
    content["same_tokens"] = {name: same_tokens(variant, part) for name, variant in variants.items()}
    for phase in _phases(variants, part, rounds):
        content["phases"].append(_phase(phase))
        content["seconds"] = time.perf_counter() - started
        write_result(out, plain(content))
        _say(phase)
    content["bytes"] = {name: _bytes(variant) for name, variant in variants.items()}
    content["load_average_at_the_end"] = list(os.getloadavg())
    print(f"wrote {write_result(out, plain(content))} after {content['seconds']:.0f} s")


def _phases(variants: dict[str, Variant], part: Part, rounds: int) -> Iterator[PhaseTiming]:
    clock = time.perf_counter
    for batch in part.batches:
        yield time_decode(variants, batch, rounds, 1, clock, prompt=part.prompt, new_tokens=part.new_tokens)
    for tokens in part.prefills:
        yield time_prefill(variants, tokens, rounds, 1, clock)


def random_llama(device: torch.device, layers: int, sizes: dict[str, int]) -> PreTrainedModel:
    """A Llama with the initial weights of its class, made on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, **sizes)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False).eval()


def structures(shape: FFNShape, part: Part) -> dict[str, SumSpec]:
    """The FFSplit mixture (int8 heavy + int4), and uniform int4 beside it; on the CPU int8 and pruning too."""
    codes = {"group": part.group}
    mixture = [
        packed_branch_spec(shape, part.heavy, bits=8, **codes),
        packed_branch_spec(shape, shape.d_ff - part.heavy, bits=4, **codes),
    ]
    found = {
        "ffsplit": sum_spec(shape, mixture, bias=shape.down_bias),
        "int4": one_branch_spec(shape, lambda size: PackedSpec(shape=size, bits=4, **codes)),
    }
    if part.name.endswith("cpu"):
        found["w8a8"] = one_branch_spec(shape, lambda size: Int8DynamicSpec(shape=size))
        found["prune-0.5"] = sum_spec(shape, [dense_branch_spec(shape, shape.d_ff // 2)], bias=shape.down_bias)
    return found


def kernel_errors(model: PreTrainedModel, spec: SumSpec, part: Part) -> dict[str, float]:
    """Relative error of a structure's forward against its own reference forward, by number of tokens.

    The reference decodes the weights and runs in float32; that of w8a8 rounds its inputs too.
    """
    module = _maker(model, spec)(None)
    wide = copy.deepcopy(module).float()
    errors = {}
    for tokens in sorted({1, 3, *part.batches, 129, *part.prefills}):
        x = torch.randn(tokens, spec.d_model, device=model.device, dtype=model.dtype)
        with torch.inference_mode():
            found = module(x).float()
            with reference_only():
                wanted = wide(x.float())
        errors[str(tokens)] = float((found - wanted).norm() / wanted.norm())
    return errors


def same_tokens(variant: Variant, part: Part) -> float | None:
    """Share of tokens that the recorded graph decodes as the same steps without it do; None without graphs."""
    model = variant.ready()
    if not can_capture(model.device):
        return None
    ids = made_up_ids(2, part.prompt)
    with torch.inference_mode():
        eager, graph = (StaticDecode(model, ids, 8, graph=graph).tokens() for graph in (False, True))
    return float((eager == graph).float().mean())


def _maker(model: PreTrainedModel, spec: SumSpec) -> Callable[[Any], SumFFN]:
    def make(_site: Any) -> SumFFN:
        module = SumFFN.empty(spec, nn.SiLU(), model.dtype, model.device)
        fill(module)
        return module.requires_grad_(False).eval()

    return make


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


def _say(phase: PhaseTiming) -> None:
    dense = phase.seconds["dense"]
    told = ", ".join(f"{name} {1e3 * found:.3f} ms (x{dense / found:.2f})" for name, found in phase.seconds.items())
    print(f"{phase.phase} {phase.tokens}{' (graph)' if phase.graph else ''}: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32, help="of the random Llama")
    parser.add_argument("--device", default="cuda", help="of the random Llama")
    parser.add_argument("--out", help="the result's name, without .json")
    given = parser.parse_args()
    part = PARTS[given.part]
    about: Any
    if given.part == "cpu":
        source = open_source(str(smollm2()))
        model = source.load().requires_grad_(False)
        about = {"name": Path(source.name).name, "hash": hash_model(model)}
    else:
        sizes = TINY if given.part == "tiny" else SEVEN_B
        model = random_llama(torch.device(given.device), given.layers, sizes)
        about = {**sizes, "layers": given.layers, "weights": "random"}
    site = find_ffns(model).sites[0]
    specs = structures(FFNShape(site.d_model, site.d_ff, site.gated), part)
    measure(model, part, specs, given.rounds, given.out or part.name, about)


if __name__ == "__main__":
    main()
