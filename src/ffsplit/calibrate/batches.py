"""From text, ids or ready-made batches to what a model's forward takes, whatever kind of model it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffsplit.calibrate.sources import TextSource, load_texts
from ffsplit.calibrate.tokens import TokenWindows, check_fits, tokenize_documents, tokenize_windows
from ffsplit.errors import DataError

CalibrationInput = str | Sequence[str] | Tensor | TokenWindows | Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Batches:
    """Batches for one model and where they came from.

    Attributes:
        batches: keyword arguments of the model's forward.
        name: of the source.
        sha256: of every tensor, its name, type and shape.
        samples: sequences.
        tokens: real tokens (elements of the main input for models that read no tokens).
        windows: the token windows, for models that read tokens.
    """

    batches: list[dict[str, Tensor]]
    name: str
    sha256: str
    samples: int
    tokens: int
    windows: TokenWindows | None = None

    def describe(self) -> dict[str, Any]:
        """What a report says about the data."""
        return {"source": self.name, "sha256": self.sha256, "samples": self.samples, "tokens": self.tokens}


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model is a decoder-only language model with its head."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


def make_windows(
    model: PreTrainedModel,
    tokenizer: Any | None,
    source: str | Sequence[str] | Tensor | TokenWindows,
    *,
    field: str | None = None,
    seq_len: int,
    samples: int | None,
    split: str = "calibration",
) -> TokenWindows:
    """Token windows that fit the model: contiguous text for causal models, one masked document a row for others.

    Raises:
        DataError: no text, too little of it, something else, no tokenizer, or a tokenizer of another model.
    """
    if isinstance(source, Tensor | TokenWindows):
        windows = tokenize_windows(source, None, seq_len=seq_len, samples=samples)
    else:
        if not isinstance(source, Iterable):
            raise DataError(f"text is a {type(source).__name__}; it must be a source, a list of texts, or token ids")
        if tokenizer is None:
            raise DataError("text needs a tokenizer; pass one, or pass token ids")
        texts = load_texts(
            TextSource(
                source if isinstance(source, str) else tuple(source),
                field,
                "evaluation" if split == "evaluation" else "calibration",
            )
        )
        cut = tokenize_windows if is_causal(model) else tokenize_documents
        windows = cut(texts, tokenizer, seq_len=seq_len, samples=samples)
    check_fits(windows, model)
    return windows


def make_batches(
    model: PreTrainedModel,
    tokenizer: Any | None,
    source: CalibrationInput,
    *,
    field: str | None = None,
    seq_len: int,
    samples: int,
    batch_size: int,
) -> Batches:
    """Calibration batches of any kind of source.

    Raises:
        DataError: as :func:`make_windows`; or a ready-made batch without the model's main input.
    """
    if isinstance(source, Mapping):
        source = [source]
    if _ready_made(source):
        return _given_batches(model, source)  # type: ignore[arg-type]
    windows = make_windows(model, tokenizer, source, field=field, seq_len=seq_len, samples=samples)  # type: ignore[arg-type]
    batches = [with_decoder(model, batch) for batch in windows.batches(batch_size)]
    return Batches(batches, windows.name, windows.sha256, windows.samples, windows.tokens, windows)


def _ready_made(source: CalibrationInput) -> bool:
    return isinstance(source, Sequence) and len(source) > 0 and isinstance(source[0], Mapping)


def _given_batches(model: PreTrainedModel, source: Sequence[Mapping[str, Tensor]]) -> Batches:
    main = model.main_input_name
    digest = hashlib.sha256()
    for index, batch in enumerate(source):
        if main not in batch:
            raise DataError(f"calibration batch {index} has no {main!r}, the main input of {type(model).__name__}")
        for name in sorted(batch):
            tensor = batch[name]
            if not isinstance(tensor, Tensor):
                raise DataError(f"calibration batch {index}: {name!r} is a {type(tensor).__name__}, not a tensor")
            digest.update(f"{index}|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            # As bytes: numpy has no bfloat16.
            digest.update(tensor.cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return Batches(
        batches=[dict(batch) for batch in source],
        name="batches",
        sha256=digest.hexdigest(),
        samples=sum(batch[main].shape[0] for batch in source),
        tokens=sum(_real(batch, main) for batch in source),
    )


def _real(batch: Mapping[str, Tensor], main: str) -> int:
    """Elements of a batch's main input, without padded tokens."""
    mask = batch.get("attention_mask")
    return batch[main].numel() if mask is None or mask.shape != batch[main].shape else int(mask.bool().sum())


def with_decoder(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give an encoder-decoder model the same text on both sides, shifted right for the decoder."""
    if not model.config.is_encoder_decoder:
        return batch
    ids = batch["input_ids"]
    start = model.config.decoder_start_token_id
    if start is None:
        start = model.config.bos_token_id if model.config.bos_token_id is not None else 0
    shifted = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
    mask = batch.get("attention_mask")
    return {**batch, "decoder_input_ids": shifted, **({} if mask is None else {"decoder_attention_mask": mask})}
