"""Whole-encoder speed at the budgets of ``benchmarks/glue.py``: SVD, FFSplit and pruned models beside the dense one.

Weights are random, shapes and forwards are those of real results. Sequence length 128, batch 1 and 32; all models take
turns in one process, medians. On an accelerator every forward is also timed as a recorded graph, so that the times hold
no Python. The variant without FFNs is the limit.

    python benchmarks/glue_speed.py [--device cuda] [--dtype float32] [--out glue-speed-cpu]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from _common import RESULTS, minilm, mpnet_folder, write_result
from ffsplit.bench.graphs import can_capture, captured
from ffsplit.budget.registry import entry_config
from ffsplit.families import find_ffns, read
from ffsplit.families.site import FFNSite
from ffsplit.families.surgery import activation, originals, replace, restore
from ffsplit.ffn.made_up import fill
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.registry import get_method
from ffsplit.provenance import provenance
from ffsplit.timing import medians, synchronize
from ffsplit.train.loop import precise
from glue import WAYS, keep_of

ENCODERS = {"mpnet": mpnet_folder, "minilm": minilm}
VARIANTS = ("svd", "ffsplit", "prune", "ffsplit-linear")
BUDGETS = ("43.1", "70")
BATCHES, SEQ_LEN = (1, 32), 128
Modules = dict[str, nn.Module]


def made(model: PreTrainedModel, sites: tuple[FFNSite, ...], way: str, keep: float) -> tuple[Modules, float]:
    """Sums of a method's structure with random numbers, by path, and the share of FFN parameters that they have."""
    recipe = WAYS[way].recipe
    assert recipe is not None
    config = entry_config({**recipe["method"], "keep": keep})
    modules: Modules = {}
    stored = dense = 0
    before = {path: module for site in sites for path, module in originals(model, site).items()}
    for site in sites:
        shape = FFNShape.of(read(model, site))
        spec = get_method(config.method).plan(shape, config)
        if way == "prune":
            narrow(model, site, spec.neurons)
        else:
            ffn = SumFFN.empty(spec, activation(model, site), model.dtype, model.device)
            fill(ffn)
            replace(model, site, ffn.eval())
        modules |= originals(model, site)
        stored, dense = stored + spec.parameters, dense + shape.parameters
    restore(model, before)
    return modules, stored / dense


def narrow(model: PreTrainedModel, site: FFNSite, width: int) -> None:
    """A pruned FFN as it is saved: the model's own modules with fewer neurons."""
    restore(model, {path: copy.deepcopy(module) for path, module in originals(model, site).items()})
    place = {"device": model.device, "dtype": model.dtype}
    model.set_submodule(site.up, nn.Linear(site.d_model, width, **place))
    model.set_submodule(site.down, nn.Linear(width, site.d_model, **place))


class Nothing(nn.Module):
    """An FFN that takes no time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def timer(work: Callable[[], object], device: torch.device, repeats: int) -> Callable[[], float]:
    def measure() -> float:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(device)
        return (time.perf_counter() - started) / repeats

    return measure


def measures(
    model: PreTrainedModel, variants: dict[str, Modules], ids: torch.Tensor, repeats: int, *, graph: bool
) -> list[Callable[[], float]]:
    found = []
    for modules in variants.values():
        restore(model, modules)

        def work(modules: Modules = modules) -> object:
            restore(model, modules)
            return model(input_ids=ids)

        if graph:
            work = captured(partial(model, input_ids=ids), ids.device)
        found.append(timer(work, ids.device, repeats))
    return found


def encoder_rows(encoder: str, device: torch.device, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.from_pretrained(ENCODERS[encoder]())).to(device, dtype).eval()
    sites = find_ffns(model).sites
    variants: dict[str, Modules] = {"dense": {path: m for site in sites for path, m in originals(model, site).items()}}
    keeps = {"dense": 1.0, "none": 0.0}
    for budget in BUDGETS:
        for way in VARIANTS:
            name = f"{way} {budget}"
            variants[name], keeps[name] = made(model, sites, way, keep_of(model, encoder, budget))
    for site in sites:
        replace(model, site, Nothing())
    variants["none"] = {path: module for site in sites for path, module in originals(model, site).items()}
    rows = []
    with torch.inference_mode():
        for batch in BATCHES:
            ids = (5 + torch.arange(batch * SEQ_LEN, device=device) * 7 % 50).view(batch, SEQ_LEN)
            for graph in (False, True) if can_capture(device) else (False,):
                repeats = 1 if device.type == "cpu" else 10
                try:
                    turns = measures(model, variants, ids, repeats, graph=graph)
                except RuntimeError as error:
                    print(f"{encoder} batch {batch}: no graph can be recorded: {error}", flush=True)
                    continue
                seconds = medians(turns, rounds, warmup=2)
                for name, taken in zip(variants, seconds, strict=True):
                    rows.append(
                        {
                            "encoder": encoder,
                            "batch": batch,
                            "graph": graph,
                            "variant": name,
                            "keep_ffn": keeps[name],
                            "milliseconds": 1000 * taken,
                            "speed": seconds[0] / taken,
                        }
                    )
                    print(
                        f"{encoder} batch {batch:2d} {'graph' if graph else 'eager'} {name:20s} keep {keeps[name]:.3f} "
                        f"{1000 * taken:9.3f} ms x{seconds[0] / taken:.2f}",
                        flush=True,
                    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "tf32", "float16", "bfloat16"))
    parser.add_argument("--encoders", default="mpnet,minilm")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", default="glue-speed-cpu")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    device = torch.device(options.device)
    dtype = getattr(torch, "float32" if options.dtype == "tf32" else options.dtype)
    document: dict[str, Any] = {"benchmark": "glue-speed", "dtype": options.dtype, "seq_len": SEQ_LEN, "rows": []}
    with precise("tf32" if options.dtype == "tf32" else "float32"):
        for encoder in options.encoders.split(","):
            document["rows"] += encoder_rows(encoder, device, dtype, options.rounds)
            document["provenance"] = provenance(seed=0)
            write_result(options.out, document, options.folder)


if __name__ == "__main__":
    main()
