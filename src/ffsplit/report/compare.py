"""Several checkpoints side by side: size, quality, speed, and which of them no other one beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffsplit.bench.latency import Timing, time_models
from ffsplit.calibrate.sources import Texts, TextSource, load_texts
from ffsplit.calibrate.tokens import TokenWindows, max_positions
from ffsplit.devices import device_of
from ffsplit.errors import DataError, FFSplitError
from ffsplit.evaluate.evaluate import Evaluation, data_record, evaluate, evaluation_windows
from ffsplit.evaluate.kinds import model_kind
from ffsplit.evaluate.scoring import Progress
from ffsplit.provenance import provenance
from ffsplit.report.benches import read_benches
from ffsplit.report.facts import CheckpointFacts, read_facts
from ffsplit.report.page import write_page
from ffsplit.report.rows import mark_front, reference_row, row_of

Data = TokenWindows | Texts | TextSource | Tensor | Sequence[str] | str | Path
ROUNDS, NEW_TOKENS, PROMPT = 5, 16, 32


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        rows: one plain dict per checkpoint, in the given order: ``name, kind, method, keep_ffn, keep_model, bits_ffn,
            bytes_disk, bytes_memory``; ``perplexity``, ``accuracy`` (masked LMs) or ``cosine`` (other encoders);
            ``kl, top1``; ``prefill_seconds, decode_seconds, prefill_speed, decode_speed`` (speed: times the
            reference's); ``on_front``. ``None`` where something does not apply or was not asked for.
        checkpoints: their structure and own reports.
        model_kind: ``causal``, ``masked`` or ``encoder``.
        reference_is_dense: whether the first checkpoint, which the others are held against, is uncompressed.
        settings: device, dtype of the reference, and how speed was measured (``None``: it was not).
        provenance: versions, hardware, and the text with its hashes.
        page: the HTML page, if one was written.
        benches: documents of ``ffsplit bench``, by the checkpoint's name.
    """

    rows: list[dict[str, Any]]
    checkpoints: list[CheckpointFacts]
    model_kind: str
    reference_is_dense: bool
    settings: dict[str, Any]
    provenance: dict[str, Any]
    page: Path | None = None
    benches: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """Name of the checkpoint that the others are held against."""
        return str(self.rows[0]["name"])

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain types, and ``None`` for a number that is not finite."""
        return {
            "rows": [{key: _finite(value) for key, value in row.items()} for row in self.rows],
            "layers": {facts.name: [asdict(layer) for layer in facts.layers] for facts in self.checkpoints},
            "model_kind": self.model_kind,
            "reference": self.reference,
            "reference_is_dense": self.reference_is_dense,
            "settings": self.settings,
            "provenance": self.provenance,
            "benches": dict(self.benches),
            "page": None if self.page is None else str(self.page),
        }


def compare_checkpoints(
    dirs: Sequence[str],
    *,
    data: Data = "builtin",
    field: str | None = None,
    samples: int = 8,
    seq_len: int = 512,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    speed: bool = True,
    dtype: torch.dtype | None = None,
    benches: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Comparison:
    """Measure checkpoints on the same text and the same machine. At most two of them are in memory at a time.

    Args:
        dirs: folders, GGUF files or hub ids; the first is the dense reference.
        data: windows, ids, or a SOURCE of text, of which the evaluation split is taken.
        field: of a structured source.
        samples: windows (sequences for encoders).
        seq_len: tokens per window; less if the model's limit is less.
        device: None means an accelerator if there is one.
        out: where to write the page; a folder gets ``compare.html``. None writes none.
        speed: measure it too.
        dtype: to load all of them in; None keeps each one's own.
        benches: results of ``ffsplit bench`` of these checkpoints, besides those in their folders.
        progress: called with a label, what is done and the total.

    Raises:
        DataError: no checkpoint is given, the text does not fit one of them, or a bench is none of theirs.
        ModelError: one of them cannot be loaded.
        CheckpointError: one of them is damaged.
    """
    if not dirs:
        raise DataError("nothing to compare: give at least one checkpoint, the dense model first")
    where = device_of(device)
    checkpoints = read_facts([str(place) for place in dirs])
    benched = read_benches(checkpoints, benches)
    reference = checkpoints[0].source.load(dtype).to(where)
    windows = _windows(reference, checkpoints[0], data, field, samples, seq_len)
    judge = _Judge(reference, checkpoints, windows, speed, progress)
    rows = judge.rows(dtype, where)
    mark_front(rows)
    comparison = Comparison(
        rows=rows,
        checkpoints=checkpoints,
        model_kind=str(model_kind(reference)),
        reference_is_dense=checkpoints[0].kind == "dense",
        settings={
            "device": str(where),
            "dtype": str(reference.dtype).removeprefix("torch."),
            "timing": judge.timing if speed else None,
        },
        provenance=provenance(data=data_record(windows)),
        benches=benched,
    )
    if out is None:
        return comparison
    # The page says "infinite" where JSON cannot.
    return replace(comparison, page=write_page({**comparison.to_dict(), "rows": rows}, Path(out)))


@dataclass(frozen=True)
class _Judge:
    """The reference and what every other checkpoint is measured on."""

    reference: PreTrainedModel
    checkpoints: list[CheckpointFacts]
    windows: TokenWindows
    speed: bool
    progress: Progress | None

    @property
    def timing(self) -> dict[str, int]:
        """How speed is measured: less decoding where the model has few positions."""
        length = self.windows.seq_len
        limit = max_positions(self.reference) or PROMPT + NEW_TOKENS
        prompt = max(1, min(PROMPT, length, limit // 2))
        new_tokens = max(1, min(NEW_TOKENS, limit - prompt))
        return {"rounds": ROUNDS, "seq_len": length, "prompt": prompt, "new_tokens": new_tokens}

    def rows(self, dtype: torch.dtype | None, device: torch.device) -> list[dict[str, Any]]:
        """All rows, the reference's first; a reference on its own is measured against itself."""
        first, *others = self.checkpoints
        rows: list[dict[str, Any]] = []
        for facts in others or [first]:
            model = self.reference if facts is first else facts.source.load(dtype).to(device)
            evaluation = self._evaluate(facts, model)
            timings = self._time(model)
            if not rows:
                rows.append(reference_row(first, evaluation, timings[0]))
            if facts is not first:
                rows.append(row_of(facts, evaluation, timings[1]))
        return rows

    def _evaluate(self, facts: CheckpointFacts, model: PreTrainedModel) -> Evaluation:
        def labelled(label: str, done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(f"{facts.name}: {label}", done, total)

        try:
            return evaluate(model, facts.source.tokenizer(), self.windows, self.reference, progress=labelled)
        except FFSplitError as error:
            raise type(error)(f"{facts.name} against {self.checkpoints[0].name}: {error}") from error

    def _time(self, model: PreTrainedModel) -> list[Timing] | list[None]:
        if not self.speed:
            return [None, None]
        how = self.timing
        return time_models(
            [self.reference, model],
            self.windows.input_ids[:1],
            rounds=how["rounds"],
            prompt=how["prompt"],
            new_tokens=how["new_tokens"],
        )


def _windows(
    model: PreTrainedModel, facts: CheckpointFacts, data: Data, field: str | None, samples: int, seq_len: int
) -> TokenWindows:
    if isinstance(data, str | Path):
        data = load_texts(data, field, "evaluation")
    limit = max_positions(model)
    length = seq_len if limit is None else min(seq_len, limit)
    return evaluation_windows(model, facts.source.tokenizer(), data, length, samples)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
