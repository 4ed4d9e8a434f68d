"""The protocol that all rows on SmolLM2-135M share: what is calibrated on, what is measured, and how it is written.

Calibration: the first 48 windows of 2,048 tokens of WikiText-2 ``valid.txt``. Evaluation: the first 40 windows of 2,048
tokens of WikiText-2 ``test.txt``, and as many of the C4 slice, which nothing is calibrated on.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from _common import RESULTS, data_folder, smollm2
from ffsplit.calibrate.sources import load_texts
from ffsplit.calibrate.tokens import TokenWindows, tokenize_windows
from ffsplit.evaluate.agreement import compare_language_models
from ffsplit.evaluate.perplexity import perplexity
from ffsplit.pipeline.load import open_source
from ffsplit.provenance import hash_model, provenance

SEQ_LEN, CALIBRATION_WINDOWS, EVALUATION_WINDOWS = 2048, 48, 40
MODEL = "SmolLM2-135M-Instruct Q4_1, dequantised to float32"


@dataclass(frozen=True, eq=False)
class Protocol:
    """The dense model, on the CPU and on the device, and the windows."""

    dense: PreTrainedModel
    reference: PreTrainedModel
    tokenizer: Any
    calibration: TokenWindows
    test: TokenWindows
    c4: TokenWindows
    base: dict[str, float]
    model_sha256: str

    @classmethod
    def prepare(cls, device: str, samples: int = CALIBRATION_WINDOWS, cap: int = EVALUATION_WINDOWS) -> Protocol:
        """Load the model and the texts and measure the dense model.

        Args:
            device: that the models are measured on.
            samples: calibration windows.
            cap: evaluation windows of each text.
        """
        source = open_source(str(smollm2()))
        dense, tokenizer = source.load(), source.tokenizer()
        calibration = _windows(tokenizer, data_folder() / "wikitext2" / "valid.txt", samples)
        test = _windows(tokenizer, data_folder() / "wikitext2" / "test.txt", cap)
        c4 = _c4_windows(tokenizer, cap)
        reference = copy.deepcopy(dense).to(device)
        base = {"wikitext2": perplexity(reference, test), "c4": perplexity(reference, c4)}
        print(f"dense: {base['wikitext2'].describe()} | {base['c4'].describe()}", flush=True)
        values = {name: result.value for name, result in base.items()}
        return cls(dense, reference, tokenizer, calibration, test, c4, values, hash_model(dense))

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Both perplexities, and KL and top-1 agreement with the dense model on WikiText-2."""
        both = compare_language_models(self.reference, model, self.test)
        return {
            "wikitext2": both.compressed.value,
            "c4": perplexity(model, self.c4).value,
            "kl": both.agreement.kl,
            "top1": both.agreement.top1,
        }

    @property
    def setting(self) -> dict[str, Any]:
        """What rows must have in common to stand in one file."""
        return {
            "model": {"name": MODEL, "sha256": self.model_sha256},
            "protocol": {
                "calibration": f"first {self.calibration.samples} windows of {SEQ_LEN} of WikiText-2 valid",
                "evaluation": f"first {self.test.samples} windows of {SEQ_LEN}, stride {SEQ_LEN}",
                "data": {windows.name: windows.sha256 for windows in (self.calibration, self.test, self.c4)},
            },
        }

    def kept(self, out: Path) -> list[dict[str, Any]]:
        """The rows that are in ``out`` already, each with the provenance of its own run.

        Raises:
            SystemExit: the file is of another model or protocol.
        """
        if not out.is_file():
            return []
        document = json.loads(out.read_text(encoding="utf-8"))
        if {key: document.get(key) for key in self.setting} != self.setting:
            raise SystemExit(f"{out} is of another model or protocol: give another --out")
        own = {"provenance": document["provenance"]}
        return [own | row for row in document["rows"]]

    def write(self, out: Path, benchmark: str, rows: list[dict[str, Any]], **more: Any) -> None:
        """Write the rows so far with all that it takes to repeat them."""
        document = {
            "benchmark": benchmark,
            **self.setting,
            **more,
            "dense": self.base,
            "rows": rows,
            "provenance": provenance(seed=0, data={"calibration": self.calibration.sha256, "test": self.test.sha256}),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1))


def command_line(description: str | None, out: str) -> argparse.ArgumentParser:
    """The options that scripts of this protocol have in common; results go to ``out`` in `benchmarks/results`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="regular expression that a row's name must contain")
    parser.add_argument("--windows", type=int, default=EVALUATION_WINDOWS, help="evaluation windows")
    parser.add_argument("--samples", type=int, default=CALIBRATION_WINDOWS, help="calibration windows")
    parser.add_argument("--out", type=Path, default=RESULTS / out)
    return parser


def line(row: dict[str, Any]) -> str:
    """What a measured row says on the terminal."""
    return (
        f"{row['name']:48s} keep {row['keep_ffn']:.3f} bits {row['bits_ffn']:6.3f} wt2 {row['wikitext2']:9.2f} "
        f"c4 {row['c4']:9.2f} kl {row['kl']:.3f} top1 {row['top1']:.3f} {row['seconds']:.0f} s"
    )


def _windows(tokenizer: Any, file: Path, count: int) -> TokenWindows:
    return tokenize_windows(load_texts(file), tokenizer, seq_len=SEQ_LEN, samples=count)


def _c4_windows(tokenizer: Any, count: int) -> TokenWindows:
    lines = [json.loads(line) for line in (data_folder() / "c4_slice" / "c4.jsonl").read_text().splitlines()]
    texts = tuple(line["prefix"] + line["gold_completion"] for line in lines)
    return tokenize_windows(load_texts(texts), tokenizer, seq_len=SEQ_LEN, samples=count)
