"""The one definition of perplexity that every number of this project uses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffsplit.calibrate.tokens import TokenWindows, check_fits
from ffsplit.evaluate.logits import Query
from ffsplit.evaluate.scoring import Progress, TokenScores, score_tokens


@dataclass(frozen=True)
class Perplexity:
    """Perplexity with everything needed to reproduce it.

    Attributes:
        value: ``exp(nll)``.
        nll: mean negative log-likelihood per predicted token, in nats.
        tokens: predicted tokens, ``windows * (seq_len - 1)`` without padding.
        windows: how many windows were read.
        seq_len: tokens per window.
        stride: tokens from one window's start to the next; equal to ``seq_len``, windows do not overlap.
        source: the text's name.
        split: the part of it.
        sha256: of the token ids.
    """

    value: float
    nll: float
    tokens: int
    windows: int
    seq_len: int
    stride: int
    source: str
    split: str
    sha256: str

    def describe(self) -> str:
        """One line: the value and the protocol."""
        return (
            f"perplexity {self.value:.2f} ({self.source}, split {self.split}: {self.windows} windows of "
            f"{self.seq_len} tokens, stride {self.stride}, {self.tokens:,} tokens predicted)"
        )


def perplexity(
    model: PreTrainedModel, windows: TokenWindows, batch_size: int = 1, progress: Progress | None = None
) -> Perplexity:
    """``exp`` of the mean negative log-likelihood over all predicted tokens of non-overlapping windows.

    Every window predicts its tokens 2 to ``seq_len`` from those before them in the same window; all predicted tokens
    weigh the same. Log-probabilities are taken in float32 and averaged in float64.

    Args:
        model: a causal language model, on any device; its mode is restored.
        windows: token ids ``[samples, seq_len]``; padding, if there is a mask, is neither read nor predicted.
        batch_size: windows per forward pass.
        progress: called with a label, the batches done and their total.

    Raises:
        DataError: the ids do not fit the model.
        ModelError: its logits are NaN.
    """
    check_fits(windows, model)
    return summarize(score_tokens(model, causal_queries(windows, batch_size), "perplexity", progress), windows)


def summarize(scores: TokenScores, windows: TokenWindows) -> Perplexity:
    """The perplexity of scores that were taken over all of ``windows``."""
    nll = scores.mean_nll
    return Perplexity(
        value=math.exp(nll) if nll < math.log(1e300) else math.inf,
        nll=nll,
        tokens=scores.nll.numel(),
        windows=windows.samples,
        seq_len=windows.seq_len,
        stride=windows.seq_len,
        source=windows.name,
        split=windows.split,
        sha256=windows.sha256,
    )


def causal_queries(windows: TokenWindows, batch_size: int = 1) -> list[Query]:
    """For every window, each token but the first is to be predicted at the position before it."""
    queries = [_next_tokens(batch) for batch in windows.batches(batch_size)]
    return [query for query in queries if query.targets.numel()]


def _next_tokens(batch: dict[str, Tensor]) -> Query:
    ids = batch["input_ids"]
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    predicts = torch.zeros_like(real)
    predicts[:, :-1] = real[:, :-1] & real[:, 1:]
    positions = predicts.flatten().nonzero().squeeze(1)
    return Query(batch, positions, ids.flatten()[positions + 1])
