"""Whole-encoder speed at the budgets of ``benchmarks/glue.py``: SVD, FFSplit and pruned models beside the dense one.

Weights are random, shapes and forwards are those of real results. Sequence length 128, batch 1 and 32; all models take
turns in one process, medians. The variant without FFNs is the limit. Widths and ranks are multiples of ``--align``,
budgets are met from below. MPNet's relative positions are made once, for the dense model as for the others.

On an accelerator every forward is also timed as a recorded graph, so that the times hold no Python, and with
``--compile`` as a graph of compiled layers. What cannot be recorded or compiled stays in the results, with the reason.

    python benchmarks/glue_speed.py
    python benchmarks/glue_speed.py --device cuda --dtype float32,tf32,float16 [--compile] [--budgets 43.1]
    python benchmarks/glue_speed.py --runtime onnx [--graphs FOLDER]

With ``--runtime onnx`` all variants are exported as ``ffsplit export --to onnx`` does and run in ONNX Runtime. Where
other programs use the processor, ``--threads 1 --clock cpu`` leaves out the time in which they had it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel

from _common import RESULTS, minilm, mpnet_folder, write_result
from _glue_torch import Column, CompileBudget, Timed, times
from _glue_variants import Variant, make_recordable, variants_of
from ffsplit.bench.graphs import can_capture
from ffsplit.provenance import provenance
from ffsplit.train.loop import precise

ENCODERS = {"mpnet": mpnet_folder, "minilm": minilm}
BUDGETS = ("43.1", "70")
BATCHES, SEQ_LEN = (1, 32), 128
DTYPES = ("float32", "tf32", "float16", "bfloat16")
ALIGN, CPU_ALIGN = 64, 16
"""Of widths and ranks: tiles of an accelerator's matrix units, and registers of 16 floats, which torch's products on
CPUs want whole."""
QUICK = 5
"""So many times the rounds for one sequence on a CPU, which is quick there and easily disturbed."""
Row = dict[str, Any]


def built(encoder: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """An encoder of random numbers."""
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.from_pretrained(ENCODERS[encoder]()))
    return model.to(device, dtype).eval()  # type: ignore[no-any-return]


def token_ids(batch: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return (5 + torch.arange(batch * SEQ_LEN, device=device) * 7 % 50).view(batch, SEQ_LEN)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def rounds_for(rounds: int, batch: int, device: torch.device) -> int:
    return QUICK * rounds if device.type == "cpu" and batch == 1 else rounds


def columns(batches: Sequence[int], *, graph: bool, compiled: bool) -> list[Column]:
    """The quick ones first, so that a run that is cut off loses the compiled ones."""
    plain = [Column(batch, recorded) for recorded in ((False, True) if graph else (False,)) for batch in batches]
    return plain + [Column(batch, graph, True) for batch in batches if compiled]


def rows_of(encoder: str, column: Column, variants: Sequence[Variant], found: Sequence[Timed]) -> Iterator[Row]:
    """A row for every variant, those that failed included."""
    dense = found[0].seconds
    for variant, timed in zip(variants, found, strict=True):
        row: Row = {
            "encoder": encoder,
            "batch": column.batch,
            "graph": column.graph,
            "compiled": column.compiled,
            "variant": variant.name,
            "keep_ffn": variant.keep,
            "structure": variant.structure,
        }
        if timed.seconds is None:
            row["failed"] = timed.failed
        else:
            row["milliseconds"] = 1000 * timed.seconds
            row["speed"] = None if dense is None else dense / timed.seconds
        if timed.compile_seconds is not None:
            row["compile_seconds"] = timed.compile_seconds
        print(told(row, column.title), flush=True)
        yield row


def told(row: Row, column: str) -> str:
    head = f"{row['encoder']} {column:28s} {row['variant']:20s} keep {row['keep_ffn']:.3f}"
    if "failed" in row:
        return f"{head} {row['failed']}"
    speed = "" if row["speed"] is None else f" x{row['speed']:.2f}"
    return f"{head} {row['milliseconds']:9.3f} ms{speed}"


def torch_rows(encoder: str, device: torch.device, dtype: torch.dtype, options: argparse.Namespace) -> Iterator[Row]:
    model = built(encoder, device, dtype)
    make_recordable(model)
    variants = variants_of(model, encoder, options.budgets, options.align)
    compiling = CompileBudget(options.compile_seconds)
    with torch.inference_mode():
        for column in columns(options.batches, graph=can_capture(device), compiled=options.compile):
            ids = token_ids(column.batch, device)
            rounds = rounds_for(options.rounds, column.batch, device)
            found = times(model, variants, ids, column, rounds, compiling, CLOCKS[options.clock])
            yield from rows_of(encoder, column, variants, found)


def onnx_rows(encoder: str, options: argparse.Namespace) -> Iterator[Row]:
    import _glue_onnx

    model = built(encoder, torch.device("cpu"), torch.float32)
    variants = variants_of(model, encoder, options.budgets, options.align)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.graphs or Path(temporary)
        ready = _glue_onnx.sessions(
            model, variants, folder, f"{encoder} align {options.align}", torch.get_num_threads()
        )
        for batch in options.batches:
            rounds = rounds_for(options.rounds, batch, model.device)
            found = _glue_onnx.times(ready, token_ids(batch), rounds, CLOCKS[options.clock])
            yield from rows_of(encoder, Column(batch), variants, found)


def written(name: str, options: argparse.Namespace, dtype: str, device: torch.device) -> None:
    """Time everything in one dtype; the file holds what is done when the run is cut off."""
    document: dict[str, Any] = {
        "benchmark": "glue-speed",
        "runtime": options.runtime,
        "device": device.type,
        "dtype": dtype,
        "seq_len": SEQ_LEN,
        "align": options.align,
        "rounds": options.rounds,
        "clock": options.clock,
        "load_average": {"before": os.getloadavg()},
        "rows": [],
    }
    if options.runtime == "onnx":
        document["packages"] = {package: metadata.version(package) for package in ("onnx", "onnxruntime")}
    with precise("tf32" if dtype == "tf32" else "float32"):
        for encoder in options.encoders:
            if options.runtime == "onnx":
                rows = onnx_rows(encoder, options)
            else:
                rows = torch_rows(encoder, device, getattr(torch, "float32" if dtype == "tf32" else dtype), options)
            for row in rows:  # those of a column come together, when all of them have been timed
                document["rows"].append(row)
                document["provenance"] = provenance(seed=0)
                document["load_average"]["after"] = os.getloadavg()
                write_result(name, document, options.folder)


def result_name(out: str | None, runtime: str, device: torch.device, dtype: str, *, only: bool) -> str:
    """``glue-speed-cpu``, ``glue-speed-onnx-cpu``, ``glue-speed-gpu-float16``; a name that is given is taken as it is.

    Several dtypes and accelerators have the dtype at the end of the name.
    """
    if out is not None:
        return out if only else f"{out}-{dtype}"
    if device.type != "cpu":
        return f"glue-speed-gpu-{dtype}"
    name = "glue-speed-onnx-cpu" if runtime == "onnx" else "glue-speed-cpu"
    return name if dtype == "float32" else f"{name}-{dtype}"


def listed(text: str) -> list[str]:
    return text.split(",")


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", default="torch", choices=("torch", "onnx"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", type=listed, default=["float32"], help=f"any of {', '.join(DTYPES)}")
    parser.add_argument("--encoders", type=listed, default=list(ENCODERS))
    parser.add_argument("--budgets", type=listed, default=list(BUDGETS))
    parser.add_argument("--batches", type=lambda text: [int(size) for size in text.split(",")], default=list(BATCHES))
    parser.add_argument("--align", type=int, help=f"of widths and ranks; {ALIGN} on accelerators, {CPU_ALIGN} on CPUs")
    parser.add_argument("--compile", action="store_true", help="also with every layer compiled")
    parser.add_argument("--compile-seconds", type=float, default=240, help="for all variants of an encoder together")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="of the CPU; as many as torch takes by itself unless given")
    parser.add_argument(
        "--clock", default="wall", choices=list(CLOCKS), help="cpu: the processor's time, for one thread"
    )
    parser.add_argument("--graphs", type=Path, help="folder that keeps the ONNX graphs for the next run")
    parser.add_argument("--out", help="name of the results file")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    for name, known in (("dtype", DTYPES), ("encoders", ENCODERS), ("budgets", BUDGETS)):
        if unknown := [one for one in getattr(options, name) if one not in known]:
            parser.error(f"--{name}: {', '.join(unknown)} is none of {', '.join(known)}")
    if options.runtime == "onnx" and (options.device != "cpu" or options.dtype != ["float32"] or options.compile):
        parser.error("--runtime onnx runs float32 on the CPU and compiles nothing")
    if options.clock == "cpu" and (options.device != "cpu" or options.threads != 1):
        parser.error("--clock cpu adds up the time of all threads: it goes with --threads 1, on the CPU")
    if options.align is None:
        options.align = CPU_ALIGN if torch.device(options.device).type == "cpu" else ALIGN
    return options


def main() -> None:
    options = options_of()
    transformers.utils.logging.set_verbosity_error()
    device = torch.device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for dtype in options.dtype:
        name = result_name(options.out, options.runtime, device, dtype, only=len(options.dtype) == 1)
        written(name, options, dtype, device)


if __name__ == "__main__":
    main()
