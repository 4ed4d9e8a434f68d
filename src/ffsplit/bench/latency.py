"""Forward times of whole models, side by side.

The models take turns within every round, forwards and backwards alternately, so that a drift of the machine's clock or
of its other load falls on all of them alike. Medians are compared, never single runs.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from ffsplit.errors import DataError, ModelError
from ffsplit.evaluate.hidden_states import last_states
from ffsplit.evaluate.kinds import ModelKind, model_kind
from ffsplit.evaluate.logits import device_of
from ffsplit.families.forward import evaluating
from ffsplit.timing import Clock, medians, synchronize


@dataclass(frozen=True)
class Timing:
    """How fast a model is.

    Attributes:
        prefill_seconds: median time of one forward over the window.
        decode_seconds: median time of one greedily decoded token; ``None`` for a model without a key-value cache.
        prefill_speed: the first model's time divided by this one's: 2 is twice as fast.
        decode_speed: the same for decoding.
    """

    prefill_seconds: float
    decode_seconds: float | None
    prefill_speed: float
    decode_speed: float | None

    @property
    def tokens_per_second(self) -> float | None:
        """Greedily decoded tokens per second, one sequence at a time."""
        return None if self.decode_seconds is None else 1.0 / self.decode_seconds


def time_models(
    models: Sequence[PreTrainedModel],
    window: Int[Tensor, "batch seq_len"],
    *,
    rounds: int = 5,
    warmup: int = 1,
    new_tokens: int = 16,
    prompt: int = 32,
    clock: Clock = time.perf_counter,
) -> list[Timing]:
    """Time models against the first of them, each on the device it is on.

    Args:
        models: at least one; their modes are restored.
        window: token ids of the prefill.
        rounds: timed turns of every model.
        warmup: turns before those, not timed.
        new_tokens: tokens to decode per turn, after an untimed prefill of the prompt.
        prompt: tokens at the start of the window that are decoded from.
        clock: seconds, monotonic.

    Raises:
        DataError: a count is below 1 (``warmup``: below 0).
    """
    _check_counts(rounds=rounds, new_tokens=new_tokens, prompt=prompt, warmup=warmup + 1, models=len(models))
    with evaluating(*models), torch.inference_mode():
        prefill = medians([partial(prefill_seconds, model, window, clock) for model in models], rounds, warmup)
        decode: list[float] | None = None
        if all(can_decode(model, window) for model in models):
            start = window[:1, :prompt]
            turns = [partial(decode_seconds, model, start, new_tokens, clock) for model in models]
            decode = medians(turns, rounds, warmup)
    return [
        Timing(
            prefill_seconds=prefill[index],
            decode_seconds=None if decode is None else decode[index],
            prefill_speed=prefill[0] / prefill[index],
            decode_speed=None if decode is None else decode[0] / decode[index],
        )
        for index in range(len(models))
    ]


def prefill_seconds(model: PreTrainedModel, window: Int[Tensor, "batch seq_len"], clock: Clock) -> float:
    """Time of one forward over a window: with cache and the last token's logits only, as before decoding."""
    ids = window.to(device_of(model))
    causal = model_kind(model) is ModelKind.CAUSAL
    synchronize(ids.device)
    started = clock()
    if causal:
        _step(model, ids, None)
    else:
        last_states(model, {"input_ids": ids})
    synchronize(ids.device)
    return clock() - started


def decode_seconds(
    model: PreTrainedModel,
    prompt: Int[Tensor, "batch seq_len"],
    new_tokens: int,
    clock: Clock,
    flush: Callable[[], None] | None = None,
) -> float:
    """Mean time of a token over a greedy decode of ``new_tokens``; the prompt's own forward is not timed.

    Args:
        model: a causal one.
        prompt: token ids to decode from.
        new_tokens: how many.
        clock: seconds, monotonic.
        flush: called before every token, out of the time, to empty the cache of weights that a model small enough
            would leave there.

    Raises:
        ModelError: the model keeps no key-value cache.
    """
    output = _step(model, prompt.to(device_of(model)), None)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise ModelError(f"{type(model).__name__} keeps no key-value cache, so decoding cannot be timed")
    token = output.logits[:, -1:].argmax(-1)
    seconds = 0.0
    for count in _stretches(new_tokens, flush):
        synchronize(token.device)
        started = clock()
        for _ in range(count):
            output = _step(model, token, cache)
            cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
        synchronize(token.device)
        seconds += clock() - started
    return seconds / new_tokens


def _stretches(new_tokens: int, flush: Callable[[], None] | None) -> Iterator[int]:
    """Tokens between two looks at the clock: all of them, or one each with an emptied cache."""
    if flush is None:
        yield new_tokens
        return
    for _ in range(new_tokens):
        flush()
        yield 1


def can_decode(model: PreTrainedModel, window: Int[Tensor, "batch seq_len"]) -> bool:
    """Whether a model is a causal one that keeps a key-value cache."""
    if model_kind(model) is not ModelKind.CAUSAL:
        return False
    with torch.inference_mode():
        output = _step(model, window[:1, :2].to(device_of(model)), None)
    return getattr(output, "past_key_values", None) is not None


def _step(model: PreTrainedModel, ids: Tensor, cache: Any | None) -> Any:
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1, "past_key_values": cache}
    return model(input_ids=ids, **{name: value for name, value in options.items() if name in accepted})


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            least, given = (0, count - 1) if name == "warmup" else (1, count)
            raise DataError(f"{name} {given}: must be at least {least}")
