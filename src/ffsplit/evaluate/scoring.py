"""What a language model, or two side by side, make of the tokens that a list of queries asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ffsplit.errors import DataError, ModelError
from ffsplit.evaluate.logits import CHUNK_ELEMENTS, LogitReader, Query, pieces
from ffsplit.families.forward import evaluating
from ffsplit.kernels.dispatch import exact_products
from ffsplit.ops.divergence import kl_divergence

Progress: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Per predicted token, on the CPU: the negative log-likelihood in nats, and whether the top guess was right."""

    nll: Float[Tensor, " predicted"]
    correct: Bool[Tensor, " predicted"]

    @property
    def mean_nll(self) -> float:
        """Summed in float64, whatever the number of tokens."""
        return float(self.nll.double().mean())


@dataclass(frozen=True, eq=False)
class PairScores:
    """Both models' scores, and per token KL(dense || compressed) in nats and whether their top guesses agree."""

    dense: TokenScores
    compressed: TokenScores
    kl: Float[Tensor, " predicted"]
    same_top1: Bool[Tensor, " predicted"]


def score_tokens(
    model: PreTrainedModel, queries: Sequence[Query], label: str, progress: Progress | None = None
) -> TokenScores:
    """Run one model over the queries.

    Raises:
        DataError: the queries ask for no token.
        ModelError: the model's logits are not numbers.
    """
    _check_not_empty(queries)
    parts: list[TokenScores] = []
    with evaluating(model), exact_products(), torch.no_grad():
        reader = LogitReader(model, queries[0].inputs)
        size = _chunk_tokens(reader)
        for done, query in enumerate(queries, start=1):
            targets = pieces(query.targets, size)
            parts += [_score(*pair) for pair in zip(reader.chunks(query, size), targets, strict=True)]
            _check_numbers(parts[-1], model, done)
            if progress is not None:
                progress(label, done, len(queries))
    return _join(parts)


def score_pair(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    queries: Sequence[Query],
    label: str,
    progress: Progress | None = None,
) -> PairScores:
    """Run both models over the queries once, batch by batch; they may be on different devices.

    Raises:
        DataError: the queries ask for no token, or the vocabularies differ.
        ModelError: a model's logits are not numbers.
    """
    _check_not_empty(queries)
    parts: list[PairScores] = []
    with evaluating(dense, compressed), exact_products(), torch.no_grad():
        readers = [LogitReader(model, queries[0].inputs) for model in (dense, compressed)]
        if readers[0].vocabulary != readers[1].vocabulary:
            raise DataError(
                f"cannot compare models with {readers[0].vocabulary} and {readers[1].vocabulary} logits per token"
            )
        size = _chunk_tokens(readers[0])
        for done, query in enumerate(queries, start=1):
            first, second = (reader.chunks(query, size) for reader in readers)
            targets = pieces(query.targets, size)
            parts += [_score_both(*chunk) for chunk in zip(first, second, targets, strict=True)]
            _check_numbers(parts[-1].dense, dense, done)
            _check_numbers(parts[-1].compressed, compressed, done)
            if progress is not None:
                progress(label, done, len(queries))
    return PairScores(
        _join([part.dense for part in parts]),
        _join([part.compressed for part in parts]),
        torch.cat([part.kl for part in parts]),
        torch.cat([part.same_top1 for part in parts]),
    )


def _score(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> TokenScores:
    wanted = targets.to(logits.device)
    return TokenScores(
        cross_entropy(logits, wanted, reduction="none").cpu(),
        (logits.argmax(-1) == wanted).cpu(),
    )


def _score_both(
    dense: Float[Tensor, "tokens vocab"], compressed: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> PairScores:
    compressed = compressed.to(dense.device)
    return PairScores(
        _score(dense, targets),
        _score(compressed, targets),
        kl_divergence(dense, compressed).cpu(),
        (dense.argmax(-1) == compressed.argmax(-1)).cpu(),
    )


def _join(parts: Sequence[TokenScores]) -> TokenScores:
    return TokenScores(torch.cat([part.nll for part in parts]), torch.cat([part.correct for part in parts]))


def _chunk_tokens(reader: LogitReader) -> int:
    return max(1, CHUNK_ELEMENTS // reader.vocabulary)


def _check_not_empty(queries: Sequence[Query]) -> None:
    if not queries:
        raise DataError("the evaluation text leaves no token to predict; give longer sequences")


def _check_numbers(scores: TokenScores, model: PreTrainedModel, batch: int) -> None:
    if bool(scores.nll.isnan().any()):
        raise ModelError(f"the logits of {type(model).__name__} are NaN in batch {batch} of the evaluation")
