"""How closely a compressed language model follows the dense one, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from ffsplit.calibrate.tokens import TokenWindows, check_fits
from ffsplit.evaluate.perplexity import Perplexity, causal_queries, summarize
from ffsplit.evaluate.scoring import PairScores, Progress, score_pair


@dataclass(frozen=True)
class Agreement:
    """Distance between two models' predictions.

    Attributes:
        kl: mean KL(dense || compressed) per predicted token, in nats.
        kl_p99: its 99th percentile over tokens; a low mean can hide a few wrecked predictions.
        top1: share of tokens for which both give the same most likely token.
        tokens: how many tokens were compared.
    """

    kl: float
    kl_p99: float
    top1: float
    tokens: int

    def describe(self) -> str:
        """One line."""
        return (
            f"KL to dense {self.kl:.4f} nats/token (99th percentile {self.kl_p99:.3f}), "
            f"top-1 agreement {100 * self.top1:.2f} % over {self.tokens:,} tokens"
        )


@dataclass(frozen=True)
class LanguageComparison:
    """A compressed causal model beside the dense one, on the same windows."""

    dense: Perplexity
    compressed: Perplexity
    agreement: Agreement


def compare_language_models(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    windows: TokenWindows,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> LanguageComparison:
    """Perplexity of both causal models, KL and top-1 agreement, each model run once over the windows.

    Args:
        dense: the reference.
        compressed: the model under test; may be on another device.
        windows: token ids ``[samples, seq_len]``.
        batch_size: windows per forward pass.
        progress: called with a label, the batches done and their total.

    Raises:
        DataError: the ids do not fit a model, or the models' vocabularies differ.
        ModelError: a model's logits are NaN.
    """
    check_fits(windows, dense)
    check_fits(windows, compressed)
    scores = score_pair(dense, compressed, causal_queries(windows, batch_size), "comparison", progress)
    return LanguageComparison(
        summarize(scores.dense, windows), summarize(scores.compressed, windows), agreement_of(scores)
    )


def agreement_of(scores: PairScores) -> Agreement:
    """Summary of the per-token scores."""
    kl = scores.kl.double().numpy()
    return Agreement(
        kl=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1=float(scores.same_top1.double().mean()),
        tokens=int(kl.size),
    )
