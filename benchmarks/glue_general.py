"""Text that no task is judged on, and distillation of a compressed encoder on it before any task is seen.

The text: sentences of enwik8 without its markup, half of them in pairs of neighbours; the training part of SST-2; the
part of AG News that is not reported on; the training part of STS-B, in its pairs. No label is used.

    python benchmarks/glue_general.py        # once, on any machine: build/glue-text.tsv.gz
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from _common import ROOT, data_folder
from ffsplit.calibrate.tokens import TokenWindows
from ffsplit.recover.config import Recovery
from ffsplit.recover.text import Text
from ffsplit.recover.weights import as_sums
from ffsplit.recover.whole import distil_model
from recover_smollm2 import articles

PREPARED = ROOT / "build" / "glue-text.tsv.gz"
SEQ_LEN, HELD_OUT, PAIRS_OF_TASK = 64, 1024, 3
WORDS = range(5, 41)
Pair = tuple[str, str]


@dataclass(frozen=True)
class General:
    """How an encoder learns to give its dense original's hidden states."""

    minutes: float = 2.0
    steps: int = 1_000_000
    batch: int = 256
    lr: float = 2e-4


def sentences() -> Iterator[Pair]:
    """Sentences of enwik8; every second one together with that behind it."""
    for article in articles(data_folder() / "enwik8" / "enwik8_30m.xml.gz"):
        found = [s for s in re.split(r"(?<=[.!?])\s+", article) if len(s.split()) in WORDS and "=" not in s]
        for index, (first, second) in enumerate(pairwise(found)):
            yield (first, second if index % 2 else "")


def of_tasks() -> Iterator[Pair]:
    """The unlabelled text of the tasks' training parts."""
    folder = data_folder()
    for part in ("sst2/train.tsv", "agnews/dev.tsv"):
        lines = (folder / part).read_text(encoding="utf-8").split("\n")
        yield from ((line.split("\t")[0], "") for line in lines if line)
    cells = [line.split("\t") for line in (folder / "stsb/sts-train.csv").read_text(encoding="utf-8").split("\n")]
    pairs = [(row[5], row[6]) for row in cells if len(row) > 6]
    for _ in range(PAIRS_OF_TASK):
        yield from pairs


def prepare(out: Path) -> None:
    """All the text in one random order."""
    found = [(" ".join(a.split()), " ".join(b.split())) for a, b in (*sentences(), *of_tasks())]
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(found[row]) for row in np.random.default_rng(0).permutation(len(found))]
    out.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def read(file: Path) -> list[Pair]:
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")
    return [(first, second) for first, _, second in (line.partition("\t") for line in lines)]


def windows(tokenizer: PreTrainedTokenizerBase, file: Path = PREPARED) -> TokenWindows:
    """Every sentence or pair as one padded sequence of token ids."""
    if not file.is_file():
        prepare(file)
    pairs = read(file)
    single, double = [a for a, b in pairs if not b], [(a, b) for a, b in pairs if b]
    rows: list[list[int]] = []
    for texts in (single, double):
        rows += tokenizer(texts, truncation=True, max_length=SEQ_LEN, verbose=False)["input_ids"]
    order = np.random.default_rng(1).permutation(len(rows))
    lengths = torch.tensor([len(rows[row]) for row in order])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.full_like(mask, int(tokenizer.pad_token_id))
    ids[mask.bool()] = torch.tensor([token for row in order for token in rows[row]])
    return TokenWindows.from_ids(ids, mask, name="enwik8_30m, SST-2 train, AG News dev, STS-B train")


def calibration(text: TokenWindows, samples: int) -> list[dict[str, Tensor]]:
    return text.first(min(samples, text.samples)).batches(256)


def distil(
    student: PreTrainedModel, teacher: PreTrainedModel, text: TokenWindows, how: General, seed: int
) -> dict[str, Any]:
    """Train all of the student's weights on the teacher's hidden states of every layer; in place."""
    as_sums(student)
    held_out = min(HELD_OUT, text.samples // 10)
    batches = Text(text, held_out, how.batch, seed, causal=False)
    config = Recovery(
        seq_len=SEQ_LEN, batch_size=how.batch, steps=how.steps, minutes=how.minutes, lr=how.lr, train="all", hidden=1.0,
        evaluations=4, seed=seed,
    )  # fmt: skip
    return distil_model(student, teacher, batches, config)


if __name__ == "__main__":
    prepare(PREPARED)
