"""One measured line for every method and planner: MiniLM-L6, all 6 FFNs, one protocol, on the CPU.

Calibration: 400 texts of AG News. Evaluation: the first 500 pairs of the STS benchmark's test part (Spearman of
mean-pooled embeddings, times 100), and the mean cosine of each sentence's embedding to the dense model's.

    python benchmarks/methods.py [--only PATTERN] [--out benchmarks/results/methods.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cosine_similarity

import ffsplit
from _common import data_folder, minilm, write_result
from ffsplit.budget.cost import dense_spec
from ffsplit.evaluate.embeddings import sentence_embeddings, spearman
from ffsplit.pipeline.load import open_source
from ffsplit.provenance import hash_model, provenance
from figures import sts_pairs

TEXTS, PAIRS = 400, 500
# (method, settings); every method that works on a plain (ungated) FFN of a model without a head is here, at a budget
# where it has to work for it.
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("asvd", {"keep": 0.5}),
    ("auto", {"keep": 0.5}),
    ("auto", {"bits": 3.0}),
    ("bias-prune", {"tolerance": 0.1}),
    ("block-dense", {"keep": 0.5}),
    ("cats", {"sparsity": 0.5}),
    ("chess", {"sparsity": 0.5}),
    ("drop", {"replacement": "mean"}),
    ("drop-ffns", {"keep": 0.67}),
    ("drop-ffns", {"keep": 0.7, "replacement": "linear"}),
    ("ffn-skip", {"sparsity": 0.1}),
    ("ffn-skip", {"sparsity": 0.25}),
    ("ffsplit", {"keep": 0.5}),
    ("ffsplit", {"keep": 0.5, "rest": "whitened"}),
    ("ffsplit", {"bits": 3.0}),
    ("finercut", {"keep": 0.67}),
    ("flap", {"keep": 0.5}),
    ("fp8", {}),
    ("hire", {"sparsity": 0.5}),
    ("hot-cold", {"sparsity": 0.5}),
    ("linearise", {"keep": 0.5}),
    ("lookup", {"keep": 0.75}),
    ("mixed-bits", {"neurons": {4: 512, 3: 512, 2: 512}}),
    ("moefication", {"sparsity": 0.5}),
    ("monarch", {"keep": 0.5}),
    ("prune", {"keep": 0.5}),
    ("prune", {"keep": 0.5, "score": "output_norm", "refit": False}),
    ("quantize", {"code_bits": 3}),
    ("quantize", {"code_bits": 3, "rounding": "awq", "refit": False}),
    ("ranks", {"keep": 0.5}),
    ("share", {"keep": 0.8}),
    ("share", {"keep": 0.8, "widen": True}),
    ("share", {"keep": 0.8, "tie": "all"}),
    ("share", {"keep": 0.8, "tie": "all", "widen": True}),
    ("share", {"keep": 0.75, "tie": "all", "widen": True, "group": 4}),
    ("skip-gate", {"sparsity": 0.25}),
    ("sort", {}),
    ("sparsify", {"keep": 0.5, "refit": False}),
    ("sparsify", {"pattern": "2:4", "refit": False}),
    ("stat", {"tol": 0.2}),
    ("svd", {"keep": 0.5}),
    ("teal", {"sparsity": 0.5}),
    ("w8a8", {}),
    ("whitened-svd", {"keep": 0.5}),
    ("wina", {"sparsity": 0.5}),
]


class Bench:
    """The dense model, the texts, and what a compressed model is compared with."""

    def __init__(self) -> None:
        source = open_source(str(minilm()))
        self.dense, self.tokenizer = source.load(), source.tokenizer()
        news = (data_folder() / "agnews" / "dev.tsv").read_text(encoding="utf-8").splitlines()
        self.calibration = [line.rpartition("\t")[0] for line in news[:TEXTS]]
        self.left, self.right, self.gold = (column[:PAIRS] for column in sts_pairs("test"))
        self.reference = self.embedded(self.dense)

    def embedded(self, model: transformers.PreTrainedModel) -> torch.Tensor:
        return sentence_embeddings(model, self.tokenizer, [*self.left, *self.right])

    def quality(self, embeddings: torch.Tensor) -> float:
        similarity = cosine_similarity(embeddings[:PAIRS], embeddings[PAIRS:], dim=-1)
        return 100 * spearman(similarity.double().numpy(), self.gold)

    def document(self) -> dict[str, Any]:
        return {
            "benchmark": "methods",
            "model": {"name": "MiniLM-L6 (all-MiniLM-L6-v2)", "sha256": hash_model(self.dense)},
            "protocol": {
                "calibration": f"first {TEXTS} texts of AG News dev",
                "evaluation": f"first {PAIRS} pairs of STS-B test, Spearman x 100; cosine of embeddings to dense ones",
            },
            "dense": {"spearman": self.quality(self.reference)},
            "rows": [],
        }

    def row(self, name: str, settings: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """What one method does, and the hash of the text that it was fitted on."""
        started = time.perf_counter()
        recipe = {"method": {"method": name, **settings}, "calibration": {"samples": TEXTS, "batch_size": 32}}
        result = ffsplit.compress(
            copy.deepcopy(self.dense), self.tokenizer, recipe=recipe, calibration=self.calibration, device="cpu", seed=0
        )
        seconds = time.perf_counter() - started
        embeddings = self.embedded(result.model)
        ffns = result.plan.ffns
        row = {
            "method": name,
            "settings": settings,
            "spearman": self.quality(embeddings),
            "cosine": float(cosine_similarity(self.reference, embeddings, dim=-1).double().mean()),
            "keep_ffn": result.plan.keep,
            "bits_ffn": result.plan.bits,
            "macs_ffn": sum(f.spec.macs for f in ffns) / sum(dense_spec(f.dense_shape).macs for f in ffns),
            "seconds": round(seconds, 1),
        }
        return row, result.report["calibration"]["sha256"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression that a row's method must contain")
    parser.add_argument("--out", default="methods", help="name of the results file")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    bench = Bench()
    document = bench.document()
    for name, settings in ROWS:
        if not re.search(options.only, name):
            continue
        row, text = bench.row(name, settings)
        document["rows"].append(row)
        print(
            f"{name:14s} {json.dumps(settings):60s} spearman {row['spearman']:6.2f} cosine {row['cosine']:.4f} "
            f"keep {row['keep_ffn']:.3f} bits {row['bits_ffn']:6.3f} work {row['macs_ffn']:.3f} {row['seconds']:.0f} s",
            flush=True,
        )
        document["provenance"] = provenance(seed=0, data={"calibration": text})
        write_result(options.out, document, options.folder)


if __name__ == "__main__":
    main()
