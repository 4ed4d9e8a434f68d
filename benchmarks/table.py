"""The table of the README: training-free methods on SmolLM2-135M, all 30 FFNs, one protocol.

The protocol is that of ``_protocol.py``.

    python benchmarks/table.py [--device cuda] [--only PATTERN] [--out benchmarks/results/table.json]
"""

from __future__ import annotations

import copy
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import ffsplit
from _protocol import Protocol, command_line, line


def method(name: str, drift: float = 0.0, **fields: Any) -> dict[str, Any]:
    return {"method": {"method": name, **fields}, "drift": drift}


def low_bit(heavy: float, heavy_bits: int, rest_bits: int, rest: str, **fields: Any) -> dict[str, Any]:
    return method("ffsplit", bits=8, heavy=heavy, heavy_bits=heavy_bits, rest_bits=rest_bits, rest=rest, **fields)


def budget_bits(bits: float, heavy_bits: int, rest_bits: int, group: int, drift: float = 0.5) -> dict[str, Any]:
    return method("ffsplit", drift, bits=bits, heavy_bits=heavy_bits, rest_bits=rest_bits, group=group)


def auto(drift: float = 0.5, **fields: Any) -> dict[str, Any]:
    return method("auto", drift, **fields)


# Widths that the row of keep 0.5 measures too, so that the two share their measurements.
TENTHS = [{"method": "prune", "keep": tenths / 10} for tenths in range(1, 10)]

# (name, recipe, what the prototype measured)
ROWS: list[tuple[str, dict[str, Any], float | None]] = [
    ("svd 0.75", method("svd", keep=0.75), 158_784.0),
    ("ffsplit svd 10 % heavy 0.75", method("ffsplit", keep=0.75, heavy=0.1, rest="svd", refit=False), 132.4),
    ("ffsplit svd 30 % heavy 0.75", method("ffsplit", keep=0.75, heavy=0.3, rest="svd", refit=False), 48.7),
    ("whitened svd 0.75", method("whitened-svd", keep=0.75, refit=False), 38.1),
    ("whitened svd 0.5", method("whitened-svd", keep=0.5, refit=False), 102.9),
    ("whitened svd + refit 0.75", method("whitened-svd", keep=0.75), None),
    ("whitened svd + refit 0.5", method("whitened-svd", keep=0.5), None),
    ("ffsplit whitened 10 % heavy 0.75", method("ffsplit", keep=0.75, heavy=0.1, rest="whitened", refit=False), 31.9),
    ("ffsplit whitened 35 % heavy 0.5", method("ffsplit", keep=0.5, heavy=0.35, rest="whitened", refit=False), 62.6),
    ("ffsplit whitened 10 % heavy + refit 0.75", method("ffsplit", keep=0.75, heavy=0.1, rest="whitened"), None),
    ("ffsplit whitened 35 % heavy + refit 0.5", method("ffsplit", keep=0.5, heavy=0.35, rest="whitened"), None),
    ("prune output norm 0.75", method("prune", keep=0.75, score="output_norm", refit=False), 25.6),
    ("prune output norm + refit 0.75", method("prune", keep=0.75, score="output_norm"), 21.85),
    ("prune output norm + refit 0.5", method("prune", keep=0.5, score="output_norm"), 31.3),
    ("prune leverage + refit 0.5", method("prune", keep=0.5, score="leverage"), 29.6),
    ("prune greedy OBS + refit 0.75", method("prune", keep=0.75, score="greedy_obs"), 21.45),
    ("prune greedy OBS + refit 0.5", method("prune", keep=0.5, score="greedy_obs"), 29.3),
    ("prune forward + refit 0.5", method("prune", keep=0.5, score="forward"), None),
    ("ffsplit linear 0.75", method("ffsplit", keep=0.75), None),
    ("ffsplit linear 0.5", method("ffsplit", keep=0.5), None),
    ("ffsplit linear OBS 0.5", method("ffsplit", keep=0.5, score="greedy_obs"), 28.8),
    ("rtn 3", method("quantize", code_bits=3, rounding="rtn"), 37.3),
    ("rtn 4", method("quantize", code_bits=4, rounding="rtn"), 20.6),
    ("ffsplit 12.5 % int8 + int3 rtn", low_bit(0.125, 8, 3, "rtn", refit=False), 23.9),
    ("gptq 3", method("quantize", code_bits=3, refit=False, polish=0), 22.1),
    ("gptq 4", method("quantize", code_bits=4, refit=False, polish=0), 18.6),
    ("gptq 3 + refit", method("quantize", code_bits=3, polish=0), 21.0),
    ("gptq 4 + refit", method("quantize", code_bits=4, polish=0), 18.9),
    ("ffsplit 12.5 % int8 + int3 gptq + refit", low_bit(0.125, 8, 3, "gptq", polish=0), 19.9),
    ("ffsplit 25 % int4 + int2 gptq + refit", low_bit(0.25, 4, 2, "gptq", polish=0), 27.0),
    ("best: prune greedy OBS + refit 0.5, drift", method("prune", 0.5, keep=0.5, score="greedy_obs"), None),
    ("best: prune greedy OBS + refit 0.75, drift", method("prune", 0.5, keep=0.75, score="greedy_obs"), None),
    ("best: ffsplit linear OBS 0.5, drift", method("ffsplit", 0.5, keep=0.5, heavy=0.45, score="greedy_obs"), None),
    (
        "best: ffsplit linear OBS 0.5, drift 0.25",
        method("ffsplit", 0.25, keep=0.5, heavy=0.45, score="greedy_obs"),
        None,
    ),
    ("best: ffsplit int3 + int2 3.0 bits, drift", budget_bits(3.0, 3, 2, 64), None),
    ("best: ffsplit int4 + int2 3.0 bits, drift", budget_bits(3.0, 4, 2, 128), None),
    ("best: ffsplit int3 + int2 g128 3.0 bits, drift", budget_bits(3.0, 3, 2, 128), None),
    ("best: gptq 3 + refit + polish, drift", method("quantize", 0.5, code_bits=3), None),
    ("auto: 3.0 bits", auto(bits=3.0), None),
    ("auto: 2.5 bits", auto(bits=2.5, trials=1), None),
    ("auto: 4.0 bits", auto(bits=4.0, trials=1), None),
    ("auto: keep 0.5", auto(keep=0.5), None),
    ("auto: keep 0.75", auto(keep=0.75, trials=1, methods=TENTHS), None),
    ("asvd 0.75", method("asvd", keep=0.75), None),
    ("block-dense 0.75", method("block-dense", keep=0.75), None),
    ("moefication 0.5", method("moefication", sparsity=0.5), None),
    ("hire 0.75", method("hire", sparsity=0.75), None),
    ("hot-cold 0.5", method("hot-cold", sparsity=0.5), None),
    ("skip-gate 0.25", method("skip-gate", sparsity=0.25), None),
    ("finercut mean 0.9", method("finercut", keep=0.9), None),
    # Nine attentions of this model have the parameters of three FFNs, which is what 0.9 leaves out.
    ("lookup 0.75", method("lookup", keep=0.75), None),
    ("awq 3", method("quantize", code_bits=3, rounding="awq", refit=False), None),
    ("monarch 0.75", method("monarch", keep=0.75), None),
    ("sparsify 2:4 wanda", method("sparsify", pattern="2:4", score="wanda", refit=False), None),
    ("sparsify 2:4 sparsegpt", method("sparsify", pattern="2:4", refit=False), None),
    ("sparsify 2:4 sparsegpt + refit", method("sparsify", pattern="2:4"), None),
    ("sparsify sparsegpt 0.5", method("sparsify", keep=0.5, refit=False), None),
    ("cats 0.5", method("cats", sparsity=0.5), None),
    ("chess 0.75", method("chess", sparsity=0.75), None),
    ("teal 0.5", method("teal", sparsity=0.5), None),
    ("wina 0.5", method("wina", sparsity=0.5), None),
    ("drop-ffns cosine mean 0.9", method("drop-ffns", keep=0.9), None),
    ("drop-ffns cosine nothing 0.9", method("drop-ffns", keep=0.9, replacement="nothing"), None),
    ("drop attention cosine 3", method("drop-ffns", target="attention", count=3), None),
    ("drop attention cosine 9", method("drop-ffns", target="attention", count=9), None),
    ("drop joint cosine nothing 0.9", method("drop-ffns", target="joint", keep=0.9, replacement="nothing"), None),
    ("drop joint cosine 6", method("drop-ffns", target="joint", count=6), None),
    ("finercut attention 9", method("finercut", target="attention", count=9), None),
    ("finercut joint 6", method("finercut", target="joint", count=6), None),
    ("ffn-fusion 9", {**method("ffn-fusion", count=9), "fold_norms": True}, None),
    ("ffn-fusion 9, pairs", {**method("ffn-fusion", count=9, longest=2), "fold_norms": True}, None),
    ("ffn-fusion 9, unmeasured", {**method("ffn-fusion", count=9, tol=None), "fold_norms": True}, None),
    ("flap 0.75", {**method("flap", keep=0.75), "propagate": False}, None),
    ("stat tol 0.1", method("stat", tol=0.1), None),
    ("prune taylor + refit 0.75", method("prune", keep=0.75, score="taylor"), None),
    ("share inner 0.75", method("share", keep=0.75), None),
    ("linearise 0.5", method("linearise", keep=0.5), None),
    ("bilinear 50 %", method("bilinear", light=0.5), None),
    ("gptq 3, scales, s8", method("quantize", code_bits=3, scale_bits=8, scale_search=True), None),
    ("gptq 3, 1 % outliers", method("quantize", code_bits=3, scale_bits=8, outliers=0.01), None),
    ("w8a8", method("w8a8"), None),
    ("fp8", method("fp8"), None),
]


def run(
    rows: list[tuple[str, dict[str, Any], float | None]],
    protocol: Protocol,
    device: str,
    out: Path,
    measured: Path | None,
) -> None:
    results: list[dict[str, Any]] = []
    for name, recipe, prototype in rows:
        started = time.perf_counter()
        result = ffsplit.compress(
            copy.deepcopy(protocol.dense),
            protocol.tokenizer,
            recipe=recipe,
            calibration=protocol.calibration,
            device=device,
            seed=0,
            measured=measured,
        )
        fitted = time.perf_counter() - started
        row = {
            "name": name,
            "recipe": result.recipe.model_dump(mode="json"),
            "keep_ffn": result.plan.keep,
            "bits_ffn": result.plan.bits,
            "keep_model": result.report["budget"]["keep_model"],
            "prototype": prototype,
            **protocol.measure(result.model.to(device)),
            "seconds": round(fitted, 1),
            "output_error": [layer["output_error"] for layer in result.report["layers"]],
            **({"decision": result.report["decision"]} if "decision" in result.report else {}),
        }
        results.append(row)
        print(f"{line(row)} prototype {prototype or '-'}", flush=True)
        protocol.write(out, "table", results)


def main() -> None:
    parser = command_line(__doc__, "table.json")
    parser.add_argument("--measured", type=Path, help="directory for the measurements of planners, shared by the rows")
    parser.add_argument("--extra", type=Path, help="JSON file with a list of [name, recipe] to run instead of the rows")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    rows = [(name, recipe, None) for name, recipe in json.loads(options.extra.read_text())] if options.extra else ROWS
    rows = [row for row in rows if re.search(options.only, row[0])]
    protocol = Protocol.prepare(options.device, options.samples, options.windows)
    run(rows, protocol, options.device, options.out, options.measured)


if __name__ == "__main__":
    main()
