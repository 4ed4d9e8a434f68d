"""Times of a whole model with its dense FFNs, its compressed ones, and none: the last gives Amdahl's limit."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from ffsplit.bench.caches import Flush, cold_bytes
from ffsplit.bench.fillings import Variant
from ffsplit.bench.graphs import can_capture
from ffsplit.bench.latency import can_decode, decode_seconds, prefill_seconds
from ffsplit.bench.memory import stored_bytes
from ffsplit.bench.static_decode import StaticDecode
from ffsplit.errors import ModelError
from ffsplit.families.forward import evaluating
from ffsplit.timing import Clock, Measure, medians

logger = logging.getLogger(__name__)
PROMPT, NEW_TOKENS = 32, 16
FLUSHED_TOKENS = 2
"""Fewer where the cache is emptied before each: that takes longer than the token."""
MOST_SEQUENCES = 32
"""Token counts up to this are also decoded as so many sequences at a time."""
FIRST_ID, IDS = 5, 50


@dataclass(frozen=True)
class PhaseTiming:
    """One phase at one size; seconds are of one forward.

    Attributes:
        phase: ``prefill``: one sequence of ``tokens``; ``decode``: the next token of ``tokens`` sequences.
        tokens: as above.
        seconds: by variant: ``dense``, ``this`` (not of a dense model), ``none``: with FFNs that add nothing.
        graph: whether a recorded graph was replayed.
    """

    phase: str
    tokens: int
    seconds: Mapping[str, float]
    graph: bool = False

    @property
    def speed(self) -> float | None:
        """Times the dense model's."""
        return self.seconds["dense"] / self.seconds["this"] if "this" in self.seconds else None

    @property
    def limit(self) -> float:
        """The speed with FFNs that take no time: no FFN method can give more (Amdahl)."""
        return self.seconds["dense"] / self.seconds["none"]

    @property
    def ffn_share(self) -> float:
        """Share of the dense model's time that its FFNs take."""
        return max(0.0, 1.0 - 1.0 / self.limit)

    def tokens_per_second(self, variant: str) -> float:
        return self.tokens / self.seconds[variant]


def time_prefill(variants: Mapping[str, Variant], tokens: int, rounds: int, warmup: int, clock: Clock) -> PhaseTiming:
    """One forward over a sequence, with cache, the last token's logits only."""

    def turn(variant: Variant) -> float:
        model = variant.ready()
        return prefill_seconds(model, made_up_ids(1, tokens), clock)

    with _measuring(variants):
        found = medians([partial(turn, variant) for variant in variants.values()], rounds, warmup)
    return PhaseTiming("prefill", tokens, dict(zip(variants, found, strict=True)))


def time_decode(
    variants: Mapping[str, Variant],
    sequences: int,
    rounds: int,
    warmup: int,
    clock: Clock,
    *,
    prompt: int = PROMPT,
    new_tokens: int = NEW_TOKENS,
) -> PhaseTiming:
    """The next token of a number of sequences, greedily; all variants as graphs, if all can be recorded."""
    with _measuring(variants):
        measures, graph = _decoders(variants, made_up_ids(sequences, prompt), new_tokens, clock)
        found = medians(measures, rounds, warmup)
    return PhaseTiming("decode", sequences, dict(zip(variants, found, strict=True)), graph)


def decodes(model: PreTrainedModel) -> bool:
    """Whether a model decodes with a cache."""
    with evaluating(model):
        return can_decode(model, made_up_ids(1, 2))


def made_up_ids(batch: int, length: int) -> Int[Tensor, "batch length"]:
    """Token ids that every vocabulary has, none of them special."""
    return (FIRST_ID + torch.arange(batch * length) * 7 % IDS).view(batch, length)


def _decoders(
    variants: Mapping[str, Variant], prompt: Tensor, new_tokens: int, clock: Clock
) -> tuple[list[Measure], bool]:
    device = next(iter(variants.values())).model.device
    if can_capture(device):
        try:
            decoders = [StaticDecode(variant.ready(), prompt, new_tokens) for variant in variants.values()]
            return [partial(decoder.seconds, clock) for decoder in decoders], True
        except (RuntimeError, ModelError, TypeError) as error:
            logger.warning("decoding is timed without a graph: %s", str(error).strip().splitlines()[0])

    flush = _flush_for(variants.values(), device)

    count = new_tokens if flush is None else min(new_tokens, FLUSHED_TOKENS)

    def turn(variant: Variant) -> float:
        return decode_seconds(variant.ready(), prompt, count, clock, flush)

    return [partial(turn, variant) for variant in variants.values()], False


def _flush_for(variants: Iterable[Variant], device: torch.device) -> Flush | None:
    """Empties the cache before every token if one of the models could stay in it from token to token."""
    smallest = min(stored_bytes(variant.ready()) for variant in variants)
    return Flush(device) if smallest < cold_bytes(device) else None


@contextmanager
def _measuring(variants: Mapping[str, Variant]) -> Iterator[None]:
    """All models of the variants in evaluation mode, without gradients."""
    models = {id(variant.model): variant.model for variant in variants.values()}
    with evaluating(*models.values()), torch.inference_mode():
        yield
