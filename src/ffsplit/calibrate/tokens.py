"""Texts -> token ids: windows for causal models, one padded sequence per text for encoders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ffsplit.calibrate.sources import Texts, TextSource, load_texts
from ffsplit.errors import DataError

TextLike: TypeAlias = "Texts | TextSource | Sequence[str] | str | Path"

# A prefix of the text is tokenised instead of all of it when only its first windows are asked for. The cut lies at
# white space and this many tokens behind the last one used, where it cannot change how that one was made.
_CHARACTERS_PER_TOKEN = 8
_SPARE_TOKENS = 64


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Token ids to run a model on.

    Attributes:
        input_ids: ids, on the CPU, int64.
        sha256: of the shape, the ids and the mask.
        name: the source they came from.
        tokens: how many of them are real, not padding.
        attention_mask: 1 for real tokens, 0 for padding on the right; ``None`` when there is none.
        split: the part of the source.
        text_sha256: of the text they were made from, if it is known.
    """

    input_ids: Int[Tensor, "samples seq_len"]
    sha256: str
    name: str
    tokens: int
    attention_mask: Int[Tensor, "samples seq_len"] | None = None
    split: str = "all"
    text_sha256: str | None = None

    @classmethod
    def from_ids(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        name: str = "token ids",
        split: str = "all",
        text_sha256: str | None = None,
    ) -> TokenWindows:
        """Wrap ids that are already there, ``[samples, seq_len]``.

        Raises:
            DataError: the tensor is not two-dimensional, not of integers, empty, or the mask does not fit it.
        """
        if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.numel() == 0:
            raise DataError(
                f"{name}: token ids must be integers [samples, seq_len], not {input_ids.dtype} {list(input_ids.shape)}"
            )
        ids = input_ids.detach().to("cpu", torch.int64).contiguous()
        if int(ids.min()) < 0:
            raise DataError(f"{name}: token ids must not be negative, the smallest is {int(ids.min())}")
        mask = None if attention_mask is None else attention_mask.detach().to("cpu", torch.int64).contiguous()
        if mask is not None and mask.shape != ids.shape:
            raise DataError(f"{name}: the mask is {list(mask.shape)} and the token ids are {list(ids.shape)}")
        tokens = ids.numel() if mask is None else int(mask.sum())
        return cls(ids, _hash(ids, mask), name, tokens, mask, split, text_sha256)

    @property
    def samples(self) -> int:
        return self.input_ids.shape[0]

    @property
    def seq_len(self) -> int:
        return self.input_ids.shape[1]

    def first(self, samples: int | None) -> TokenWindows:
        """The first ``samples`` sequences, all of them for ``None``."""
        if samples is None or samples == self.samples:
            return self
        if not 1 <= samples <= self.samples:
            raise DataError(f"samples {samples}: {self.name} has {self.samples} of seq_len {self.seq_len}")
        mask = None if self.attention_mask is None else self.attention_mask[:samples]
        fewer = TokenWindows.from_ids(self.input_ids[:samples], mask, name=self.name)
        return replace(fewer, split=self.split, text_sha256=self.text_sha256)

    def batches(self, batch_size: int) -> list[dict[str, Tensor]]:
        """Keyword arguments for a model, ``batch_size`` sequences at a time, padding common to a batch cut off."""
        if batch_size < 1:
            raise DataError(f"batch_size {batch_size}: must be at least 1")
        batches = []
        for start in range(0, self.samples, batch_size):
            rows = slice(start, start + batch_size)
            if self.attention_mask is None:
                batches.append({"input_ids": self.input_ids[rows]})
                continue
            mask = self.attention_mask[rows]
            longest = max(1, int(mask.any(dim=0).nonzero().max()) + 1) if mask.any() else 1
            batches.append({"input_ids": self.input_ids[rows, :longest], "attention_mask": mask[:, :longest]})
        return batches


def tokenize_windows(
    texts: TextLike | Tensor | TokenWindows,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seq_len: int = 2048,
    samples: int | None = None,
) -> TokenWindows:
    """Cut text into windows for a causal model.

    The documents are joined with a blank line between them (a single file is taken exactly as it is), tokenised once
    without special tokens, and cut into non-overlapping windows of ``seq_len`` tokens. No window starts with a
    beginning-of-sequence token: this is the plain protocol that published perplexities use. The last, incomplete
    window is dropped.

    Args:
        texts: text, or ids ``[samples, seq_len]``, which keep their own ``seq_len``.
        tokenizer: may be ``None`` if ``texts`` are ids.
        seq_len: tokens per window, at least 2.
        samples: take the first so many windows, or as many as there are; ``None`` for all.

    Raises:
        DataError: too little text for one window, or no tokenizer for text.
    """
    _check_sizes(seq_len, samples)
    if isinstance(texts, Tensor | TokenWindows):
        return _given(texts, samples)
    loaded = load_texts(texts)
    needed = None if samples is None else samples * seq_len
    ids = _encode(loaded.joined(), _required(tokenizer, loaded.name), needed)
    windows = len(ids) // seq_len if samples is None else min(samples, len(ids) // seq_len)
    if windows == 0:
        raise DataError(
            f"source {loaded.name!r}: {len(ids)} tokens of text, but one window needs seq_len {seq_len}; "
            "give more text or a smaller seq_len"
        )
    cut = torch.tensor(ids[: windows * seq_len]).view(windows, seq_len)
    return TokenWindows.from_ids(cut, name=loaded.name, split=loaded.split, text_sha256=loaded.sha256)


def tokenize_documents(
    texts: TextLike | Tensor | TokenWindows,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seq_len: int = 128,
    samples: int | None = None,
) -> TokenWindows:
    """One sequence per text for an encoder: with special tokens, cut at ``seq_len``, padded on the right, masked.

    A record or a list's entry is one sequence, a text file gives one per line, ``builtin`` one per paragraph.

    Args:
        texts: text, or ids ``[samples, seq_len]`` without padding.
        tokenizer: may be ``None`` if ``texts`` are ids.
        seq_len: the most tokens of a sequence, special tokens included.
        samples: take the first so many sequences, or as many as there are; ``None`` for all.

    Raises:
        DataError: no tokenizer for text.
    """
    _check_sizes(seq_len, samples)
    if isinstance(texts, Tensor | TokenWindows):
        return _given(texts, samples)
    loaded = load_texts(texts)
    tokenizer = _required(tokenizer, loaded.name)
    sequences = list(islice(loaded.sequences(), samples))
    rows: list[list[int]] = tokenizer(sequences, truncation=True, max_length=seq_len, verbose=False)["input_ids"]
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.full_like(mask, _padding_id(tokenizer))
    ids[mask.bool()] = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    return TokenWindows.from_ids(ids, mask, name=loaded.name, split=loaded.split, text_sha256=loaded.sha256)


def check_fits(windows: TokenWindows, model: PreTrainedModel) -> None:
    """Refuse ids that the model's embedding does not have and sequences longer than its positions.

    Raises:
        DataError: with the largest id and the embedding's rows, or with ``seq_len`` and the model's limit.
    """
    kind = type(model).__name__
    if (wanted := getattr(model, "main_input_name", "input_ids")) != "input_ids":
        raise DataError(f"{kind} reads {wanted!r}, not text; token ids cannot be run through it")
    rows = int(model.get_input_embeddings().weight.shape[0])
    largest = int(windows.input_ids.max())
    if largest >= rows:
        raise DataError(
            f"{windows.name}: token id {largest} is outside the {rows} rows of the embedding of {kind}; "
            "the tokenizer does not belong to this model"
        )
    limit = max_positions(model)
    if limit is not None and windows.seq_len > limit:
        raise DataError(f"seq_len {windows.seq_len}: {kind} has {limit} positions; give seq_len {limit} or less")


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence the model was built for; ``None`` if its configuration sets no limit."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit - _reserved_positions(model)
    return None


def _reserved_positions(model: PreTrainedModel) -> int:
    """RoBERTa and its kin count positions from behind the padding index and lose the first rows of their table."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, needed: int | None) -> list[int]:
    """The text's ids; if only ``needed`` are wanted, at least that many of the first ones (or all there are)."""
    size = len(text) if needed is None else needed * _CHARACTERS_PER_TOKEN
    while size < len(text):
        end = max(text.rfind(space, 0, size) for space in (" ", "\n"))
        ids = _ids(text[: max(end, 0)], tokenizer)
        if needed is not None and len(ids) >= needed + _SPARE_TOKENS:
            return ids
        size *= 2
    return _ids(text, tokenizer)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # verbose=False: the text is longer than the model's limit on purpose, it is cut into windows afterwards.
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[int] = encoded["input_ids"]
    return ids


def _given(given: Tensor | TokenWindows, samples: int | None) -> TokenWindows:
    windows = given if isinstance(given, TokenWindows) else TokenWindows.from_ids(given)
    return windows.first(None if samples is None else min(samples, windows.samples))


def _required(tokenizer: PreTrainedTokenizerBase | None, name: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise DataError(f"source {name!r}: text needs a tokenizer; give one, or token ids [samples, seq_len]")
    return tokenizer


def _padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    candidates: tuple[int | None, ...] = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None), 0)


def _check_sizes(seq_len: int, samples: int | None) -> None:
    if seq_len < 2:
        raise DataError(f"seq_len {seq_len}: must be at least 2")
    if samples is not None and samples < 1:
        raise DataError(f"samples {samples}: must be at least 1")


def _hash(ids: Tensor, mask: Tensor | None) -> str:
    digest = hashlib.sha256(repr((tuple(ids.shape), mask is not None)).encode())
    digest.update(ids.numpy().astype("<i8").tobytes())
    if mask is not None:
        digest.update(mask.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
