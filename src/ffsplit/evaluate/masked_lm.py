"""Masked-token prediction of encoders that keep their language-model head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffsplit.calibrate.tokens import TokenWindows, check_fits
from ffsplit.errors import DataError
from ffsplit.evaluate.agreement import Agreement, agreement_of
from ffsplit.evaluate.logits import Query, pieces
from ffsplit.evaluate.scoring import Progress, TokenScores, score_pair, score_tokens

MASKED_SHARE = 0.15


@dataclass(frozen=True)
class MaskedLM:
    """Recovery of masked tokens.

    Attributes:
        accuracy: share of masked tokens whose most likely prediction is the token that was there.
        cross_entropy: mean negative log-likelihood of those tokens, in nats; a pseudo cross-entropy, because every
            token is predicted from both sides and with its masked neighbours missing.
        tokens: masked tokens.
        sequences: how many sequences they lie in.
        seq_len: the longest of them.
        share: of the ordinary tokens that were masked.
        seed: of the choice.
        source: the text's name.
        split: the part of it.
        sha256: of the token ids before masking.
    """

    accuracy: float
    cross_entropy: float
    tokens: int
    sequences: int
    seq_len: int
    share: float
    seed: int
    source: str
    split: str
    sha256: str

    def describe(self) -> str:
        """One line: the values and the protocol."""
        return (
            f"masked-LM accuracy {100 * self.accuracy:.2f} %, cross-entropy {self.cross_entropy:.3f} nats "
            f"({self.source}, split {self.split}: {self.tokens:,} tokens masked in {self.sequences} sequences, "
            f"seed {self.seed})"
        )


@dataclass(frozen=True)
class MaskedComparison:
    """A compressed masked-LM beside the dense one, on the same masks."""

    dense: MaskedLM
    compressed: MaskedLM
    agreement: Agreement


def masked_lm(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    mask_id: int,
    special_ids: Sequence[int] = (),
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> MaskedLM:
    """Mask 15 % of the ordinary tokens with a fixed seed and let the model fill them in.

    Args:
        model: an encoder with a masked-LM head; its mode is restored.
        windows: from :func:`ffsplit.calibrate.tokens.tokenize_documents`.
        mask_id: the id that stands for a masked token; always written, without random replacements.
        special_ids: ids that are never masked, besides padding.
        batch_size: sequences per forward pass.
        seed: of the masks, which depend on nothing else but the ids.
        progress: called with a label, the batches done and their total.

    Raises:
        DataError: the ids do not fit the model, or none was masked.
        ModelError: its logits are NaN.
    """
    check_fits(windows, model)
    queries = masked_queries(windows, mask_id=mask_id, special_ids=special_ids, batch_size=batch_size, seed=seed)
    return _summarize(score_tokens(model, queries, "masked LM", progress), windows, seed)


def compare_masked_models(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    windows: TokenWindows,
    *,
    mask_id: int,
    special_ids: Sequence[int] = (),
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> MaskedComparison:
    """:func:`masked_lm` of both models on the same masks, with KL and top-1 agreement at the masked tokens."""
    check_fits(windows, dense)
    check_fits(windows, compressed)
    queries = masked_queries(windows, mask_id=mask_id, special_ids=special_ids, batch_size=batch_size, seed=seed)
    scores = score_pair(dense, compressed, queries, "masked LM comparison", progress)
    return MaskedComparison(
        _summarize(scores.dense, windows, seed), _summarize(scores.compressed, windows, seed), agreement_of(scores)
    )


def masked_queries(
    windows: TokenWindows, *, mask_id: int, special_ids: Sequence[int] = (), batch_size: int = 8, seed: int = 0
) -> list[Query]:
    """The batches with their masked inputs, and what was under the masks.

    Raises:
        DataError: no token was masked.
    """
    draws = torch.rand(windows.input_ids.shape, generator=torch.Generator().manual_seed(seed))
    ordinary = ~torch.isin(windows.input_ids, torch.tensor([mask_id, *special_ids]))
    if windows.attention_mask is not None:
        ordinary &= windows.attention_mask.bool()
    masked = ordinary & (draws < MASKED_SHARE)
    if not bool(masked.any()):
        raise DataError(f"{windows.name}: none of the {windows.tokens} tokens was masked; give more text")
    pairs = zip(windows.batches(batch_size), pieces(masked, batch_size), strict=True)
    return [_hide(batch, chosen, mask_id) for batch, chosen in pairs if bool(chosen.any())]


def _hide(batch: dict[str, Tensor], masked: Tensor, mask_id: int) -> Query:
    ids = batch["input_ids"]
    masked = masked[:, : ids.shape[1]]
    hidden = batch | {"input_ids": ids.masked_fill(masked, mask_id)}
    positions = masked.flatten().nonzero().squeeze(1)
    return Query(hidden, positions, ids.flatten()[positions])


def _summarize(scores: TokenScores, windows: TokenWindows, seed: int) -> MaskedLM:
    return MaskedLM(
        accuracy=float(scores.correct.double().mean()),
        cross_entropy=scores.mean_nll,
        tokens=scores.nll.numel(),
        sequences=windows.samples,
        seq_len=windows.seq_len,
        share=MASKED_SHARE,
        seed=seed,
        source=windows.name,
        split=windows.split,
        sha256=windows.sha256,
    )
