"""Examples -> token ids, once; and batches of examples of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ffsplit.errors import DataError
from ffsplit.tasks.examples import Examples
from ffsplit.train.lengths import alike

_MULTIPLE = 8
Batch = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids and labels, ready on a device.

    Attributes:
        inputs: keyword arguments of the model's forward, ``[examples, seq_len]``, padded on the right.
        labels: ``[examples]``.
        lengths: real tokens of every example, on the CPU, so that choosing a batch's length waits for no device.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device) -> Encoded:
        moved = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return replace(self, inputs=moved, labels=self.labels.to(device))

    def batch(self, rows: np.ndarray) -> tuple[Batch, Tensor, Tensor]:
        """Inputs of some examples without the padding that none of them needs, their labels, and their numbers."""
        longest = -(-int(self.lengths[rows].max()) // _MULTIPLE) * _MULTIPLE
        index = torch.from_numpy(rows).to(self.labels.device, non_blocking=True)
        inputs = {name: tensor[index, :longest] for name, tensor in self.inputs.items()}
        return inputs, self.labels[index], index

    def in_order_of_length(self, batch_size: int) -> list[np.ndarray]:
        """All examples, the longest first, for evaluation."""
        order = np.argsort(-self.lengths, kind="stable")
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def give_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer without a padding token pad with its end of text, as is usual for decoders."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token


def encode(examples: Examples, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Encoded:
    """Tokenise all examples, cut at ``seq_len`` tokens.

    Raises:
        DataError: the tokenizer gives no padding, or ``seq_len`` leaves no room for a pair.
    """
    if tokenizer.pad_token_id is None or seq_len < 8:
        raise DataError(f"{examples.name}: needs a tokenizer with a padding token, and seq_len={seq_len} at least 8")
    texts = [list(examples.first)] + ([] if examples.second is None else [list(examples.second)])
    encoded = tokenizer(*texts, truncation=True, max_length=seq_len, padding="longest", padding_side="right",
                        return_tensors="pt", return_attention_mask=True)  # fmt: skip
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded]
    lengths = encoded["attention_mask"].sum(1).numpy()
    return Encoded({name: encoded[name] for name in names}, torch.from_numpy(examples.labels), lengths)


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Batches that hold all examples once; the last one may be smaller."""
    return -(-examples // batch_size)


class Epochs:
    """Which examples every step trains on: all of them once an epoch, those of similar length together."""

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.steps = steps_per_epoch(len(lengths), batch_size)
        self._epoch = lru_cache(maxsize=1)(self._shuffled)

    def rows(self, step: int) -> np.ndarray:
        """The examples of a step, counted from 0 over all epochs."""
        return self._epoch(step // self.steps)[step % self.steps]

    def _shuffled(self, epoch: int) -> Sequence[np.ndarray]:
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self.lengths))
        order = alike(order, self.lengths, self.batch_size)
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return [batches[index] for index in generator.permutation(len(batches))]
