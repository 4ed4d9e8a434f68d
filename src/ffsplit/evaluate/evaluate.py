"""One call that measures a text model with what suits its kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ffsplit.calibrate.sources import Texts, TextSource, load_texts
from ffsplit.calibrate.tokens import TokenWindows, max_positions, tokenize_documents, tokenize_windows
from ffsplit.errors import DataError
from ffsplit.evaluate.agreement import Agreement, compare_language_models
from ffsplit.evaluate.hidden_states import HiddenSimilarity, hidden_similarity
from ffsplit.evaluate.kinds import ModelKind, model_kind
from ffsplit.evaluate.masked_lm import MaskedLM, compare_masked_models, masked_lm
from ffsplit.evaluate.perplexity import Perplexity, perplexity
from ffsplit.evaluate.scoring import Progress
from ffsplit.evaluate.size import Size, size_of
from ffsplit.plain import plain
from ffsplit.provenance import provenance

CAUSAL_SEQ_LEN = 2048
ENCODER_SEQ_LEN = 128


@dataclass(frozen=True)
class Evaluation:
    """What was measured; ``None`` where it does not apply to the model's kind or no dense model was given.

    Attributes:
        kind: ``causal``, ``masked`` or ``encoder``.
        quality: perplexity or masked-LM accuracy of the model.
        dense: the same of the dense model.
        agreement: KL and top-1 agreement with the dense model.
        hidden: similarity of hidden states to the dense model.
        size: of the model in memory.
        dense_size: of the dense model in memory.
        provenance: versions, hardware, date, seed and hashes of the text and its token ids.
    """

    kind: str
    quality: Perplexity | MaskedLM | None
    dense: Perplexity | MaskedLM | None
    agreement: Agreement | None
    hidden: HiddenSimilarity | None
    size: Size
    dense_size: Size | None
    provenance: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain types only, and ``None`` for a number that is not finite."""
        document: dict[str, Any] = plain(asdict(self))
        return document

    def describe(self) -> list[str]:
        """Lines for a person."""
        lines = [] if self.dense is None else [f"dense:      {self.dense.describe()}"]
        lines += [] if self.quality is None else [f"this model: {self.quality.describe()}"]
        parts: tuple[Agreement | HiddenSimilarity | None, ...] = (self.agreement, self.hidden)
        return lines + [part.describe() for part in parts if part is not None] + [self.size.describe()]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: TokenWindows | Texts | TextSource | Tensor | Sequence[str] | str | Path = "builtin",
    against: PreTrainedModel | None = None,
    *,
    seq_len: int | None = None,
    samples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model: a causal LM by perplexity, KL and top-1 agreement; a masked LM by the accuracy on masked tokens
    (and the same agreement there); any other text model by the similarity of its hidden states to the dense model's.

    Args:
        model: on any device; its mode is restored.
        tokenizer: may be ``None`` for a causal LM or an encoder if ``data`` are token ids.
        data: windows, ids ``[samples, seq_len]``, or a SOURCE of text, of which the ``evaluation`` split is taken.
        against: the dense model.
        seq_len: tokens per sequence; 2048 for a causal LM and 128 for others, or the model's limit if that is less.
        samples: the first so many sequences only.
        batch_size: sequences per forward pass; 1 for a causal LM and 8 for others if not given.
        seed: of the masks.
        progress: called with a label, the batches done and their total.

    Raises:
        DataError: the text is missing or does not fit, or the model can only be judged against a dense one.
        ModelError: NaN in logits or states.
    """
    kind = model_kind(model)
    if kind is ModelKind.ENCODER and against is None:
        raise DataError(
            f"{type(model).__name__} has no language-model head, so its hidden states are compared with those of the "
            "dense model: say which it is (against)"
        )
    windows = evaluation_windows(model, tokenizer, data, seq_len, samples)
    batch_size = (1 if kind is ModelKind.CAUSAL else 8) if batch_size is None else batch_size
    if kind is ModelKind.CAUSAL:
        parts = _causal(model, against, windows, batch_size, progress)
    elif kind is ModelKind.MASKED:
        parts = _masked(model, tokenizer, against, windows, batch_size, seed, progress)
    else:
        assert against is not None
        parts = {"hidden": hidden_similarity(against, model, windows, batch_size, progress)}
    return Evaluation(
        kind=str(kind),
        **({"quality": None, "dense": None, "agreement": None, "hidden": None} | parts),
        size=size_of(model),
        dense_size=None if against is None else size_of(against),
        provenance=provenance(seed=seed, data=data_record(windows)),
    )


def evaluation_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: TokenWindows | Texts | TextSource | Tensor | Sequence[str] | str | Path = "builtin",
    seq_len: int | None = None,
    samples: int | None = None,
) -> TokenWindows:
    """The token ids that :func:`evaluate` would run, cut as the model's kind needs it."""
    if isinstance(data, str | Path):
        data = load_texts(data, split="evaluation")
    causal = model_kind(model) is ModelKind.CAUSAL
    if seq_len is None:
        usual = CAUSAL_SEQ_LEN if causal else ENCODER_SEQ_LEN
        seq_len = min(usual, max_positions(model) or usual)
    cut = tokenize_windows if causal else tokenize_documents
    return cut(data, tokenizer, seq_len=seq_len, samples=samples)


def data_record(windows: TokenWindows) -> dict[str, Any]:
    """What a result says about the tokens it was measured on."""
    return {
        "source": windows.name,
        "split": windows.split,
        "samples": windows.samples,
        "seq_len": windows.seq_len,
        "tokens": windows.tokens,
        "tokens_sha256": windows.sha256,
        "text_sha256": windows.text_sha256,
    }


def _causal(
    model: PreTrainedModel,
    against: PreTrainedModel | None,
    windows: TokenWindows,
    batch_size: int,
    progress: Progress | None,
) -> dict[str, Any]:
    if against is None:
        return {"quality": perplexity(model, windows, batch_size, progress)}
    both = compare_language_models(against, model, windows, batch_size, progress)
    return {"quality": both.compressed, "dense": both.dense, "agreement": both.agreement}


def _masked(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    against: PreTrainedModel | None,
    windows: TokenWindows,
    batch_size: int,
    seed: int,
    progress: Progress | None,
) -> dict[str, Any]:
    if tokenizer is None or tokenizer.mask_token_id is None:
        raise DataError(f"{type(model).__name__} is measured on masked tokens; give a tokenizer that has a mask token")
    options: dict[str, Any] = {
        "mask_id": tokenizer.mask_token_id,
        "special_ids": tuple(tokenizer.all_special_ids),
        "batch_size": batch_size,
        "seed": seed,
        "progress": progress,
    }
    if against is None:
        return {"quality": masked_lm(model, windows, **options)}
    both = compare_masked_models(against, model, windows, **options)
    return {"quality": both.compressed, "dense": both.dense, "agreement": both.agreement}
