"""Sentence embeddings by mean pooling, and how well their similarities follow human scores (STS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ffsplit.calibrate.tokens import max_positions
from ffsplit.errors import DataError, ModelError
from ffsplit.evaluate.hidden_states import last_states
from ffsplit.evaluate.logits import device_of
from ffsplit.evaluate.scoring import Progress
from ffsplit.families.forward import evaluating
from ffsplit.kernels.dispatch import exact_products


@dataclass(frozen=True)
class SentenceSimilarity:
    """Rank and linear correlation, in [-1, 1], of cosine similarities with the gold scores of sentence pairs."""

    spearman: float
    pearson: float
    pairs: int

    def describe(self) -> str:
        """One line, in the usual hundredths."""
        return f"Spearman {100 * self.spearman:.2f}, Pearson {100 * self.pearson:.2f} ({self.pairs:,} pairs)"


def sentence_embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    batch_size: int = 32,
    seq_len: int | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, "sentences d_model"]:
    """The mean of the last hidden states over a sentence's real tokens, special tokens included; not normalised.

    Args:
        model: an encoder, on any device; its mode is restored.
        tokenizer: the model's.
        sentences: at least one.
        batch_size: sentences per forward pass; sentences of similar length run together.
        seq_len: cut longer sentences here; ``None`` for the model's own limit.
        progress: called with a label, the batches done and their total.

    Returns:
        Float32 embeddings on the CPU, in the order of ``sentences``.

    Raises:
        DataError: there are no sentences.
        ModelError: an embedding is not finite.
    """
    if not sentences or batch_size < 1:
        raise DataError(f"sentence embeddings need at least one sentence and batch_size >= 1, not {batch_size}")
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    limit = max_positions(model) if seq_len is None else seq_len
    pooled: list[Tensor] = []
    with evaluating(model), exact_products(), torch.no_grad():
        for done, batch in enumerate(batches, start=1):
            pooled.append(_mean_states(model, tokenizer, [sentences[index] for index in batch], limit))
            if progress is not None:
                progress("embeddings", done, len(batches))
    embeddings = torch.cat(pooled)[torch.tensor(order).argsort()]
    if not bool(embeddings.isfinite().all()):
        raise ModelError(f"{type(model).__name__} gives sentence embeddings that are not finite")
    return embeddings


def sentence_similarity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    first: Sequence[str],
    second: Sequence[str],
    gold: ArrayLike,
    batch_size: int = 32,
    seq_len: int | None = None,
    progress: Progress | None = None,
) -> SentenceSimilarity:
    """Correlate the cosine similarity of sentence pairs with gold scores, as on the STS benchmark.

    Raises:
        DataError: the lists have different lengths, or a correlation is undefined.
    """
    if len(first) != len(second):
        raise DataError(f"sentence pairs: {len(first)} first and {len(second)} second sentences")
    everything = [*first, *second]
    embeddings = sentence_embeddings(model, tokenizer, everything, batch_size, seq_len, progress)
    left, right = embeddings[: len(first)], embeddings[len(first) :]
    similarity = cosine_similarity(left, right, dim=-1).double().numpy()
    return SentenceSimilarity(spearman(similarity, gold), pearson(similarity, gold), len(first))


def spearman(values: ArrayLike, gold: ArrayLike) -> float:
    """Rank correlation in [-1, 1].

    Raises:
        DataError: fewer than two pairs, or all values of a side are equal.
    """
    return float(stats.spearmanr(*_pairs(values, gold)).statistic)


def pearson(values: ArrayLike, gold: ArrayLike) -> float:
    """Linear correlation in [-1, 1]; raises as :func:`spearman`."""
    return float(stats.pearsonr(*_pairs(values, gold)).statistic)


def _pairs(values: ArrayLike, gold: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(values, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or first.size < 2:
        raise DataError(
            f"correlation: {first.shape} values against {second.shape} gold scores; need equal lengths >= 2"
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise DataError("correlation: a value or gold score is not finite")
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        raise DataError("correlation: undefined, because all values or all gold scores are equal")
    return first, second


def _mean_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: list[str], limit: int | None
) -> Float[Tensor, "sentences d_model"]:
    encoded = tokenizer(
        sentences, padding=True, truncation=limit is not None, max_length=limit, return_tensors="pt", verbose=False
    )
    names = ("input_ids", "attention_mask")
    inputs = {name: encoded[name].to(device_of(model)) for name in names}
    states = last_states(model, inputs).float()
    weight = inputs["attention_mask"].unsqueeze(-1).to(states)
    mean: Tensor = (states * weight).sum(1) / weight.sum(1).clamp_min(1.0)
    return mean.cpu()
