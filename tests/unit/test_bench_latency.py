"""Timing: its structure and the order of turns, never how fast anything is."""

from __future__ import annotations

import itertools

import pytest
import torch

from ffsplit.bench.latency import can_decode, decode_seconds, prefill_seconds, time_models
from ffsplit.errors import DataError, ModelError
from ffsplit.timing import interleave
from tests.tiny import tiny

WINDOW = torch.arange(3, 19)[None]


def ticking(step: float = 1.0):
    """A clock that moves by ``step`` each time it is read."""
    ticks = itertools.count()
    return lambda: step * next(ticks)


def test_turns_alternate_their_direction_and_the_warm_up_is_dropped() -> None:
    order: list[str] = []
    results = interleave([lambda: order.append("a") or 1.0, lambda: order.append("b") or 2.0], rounds=3, warmup=1)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert results == [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]


def test_speed_is_relative_to_the_first_model() -> None:
    # A clock that leaps: the second of the two models alternately takes 1 and 3 ticks more.
    readings = itertools.accumulate([0.0, 2.0, 0.0, 1.0, 0.0, 1.0, 0.0, 2.0] * 8)
    model = tiny("llama")
    first, second = time_models([model, model], WINDOW, rounds=2, warmup=0, new_tokens=1, clock=lambda: next(readings))
    assert (first.prefill_seconds, second.prefill_seconds) == (2.0, 1.0)
    assert (first.prefill_speed, second.prefill_speed) == (1.0, 2.0)
    assert second.decode_speed == first.decode_seconds / second.decode_seconds


def test_real_times_are_positive() -> None:
    timings = time_models([tiny("llama"), tiny("gpt2")], WINDOW, rounds=1, warmup=0, new_tokens=2, prompt=8)
    for timing in timings:
        assert timing.prefill_seconds > 0
        assert timing.decode_seconds > 0
        assert timing.tokens_per_second == 1 / timing.decode_seconds


def test_a_decoded_token_is_the_mean_over_the_new_ones() -> None:
    assert decode_seconds(tiny("llama"), WINDOW, new_tokens=4, clock=ticking(8.0)) == 2.0


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "t5", "openai-gpt"])
def test_models_without_a_cache_get_a_prefill_time_only(name: str) -> None:
    model = tiny(name)
    assert not can_decode(model, WINDOW)
    (timing,) = time_models([model], WINDOW, rounds=1, warmup=0, clock=ticking())
    assert timing.prefill_seconds == 1.0
    assert timing.decode_seconds is timing.decode_speed is timing.tokens_per_second is None


def test_decoding_without_a_cache_is_refused() -> None:
    with pytest.raises(ModelError, match="OpenAIGPTLMHeadModel keeps no key-value cache"):
        decode_seconds(tiny("openai-gpt"), WINDOW, 1, ticking())


def test_decoding_continues_from_the_cache() -> None:
    model, lengths = tiny("llama"), []
    model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.inference_mode():
        decode_seconds(model, WINDOW[:, :8], new_tokens=3, clock=ticking())
    assert lengths == [8, 1, 1, 1]


def test_prefill_asks_for_the_last_logits_only() -> None:
    model, shapes = tiny("llama"), []
    model.lm_head.register_forward_hook(lambda _module, _args, output: shapes.append(tuple(output.shape)))
    with torch.inference_mode():
        prefill_seconds(model, WINDOW, ticking())
    assert shapes == [(1, 1, 128)]


def test_the_mode_of_a_model_is_restored() -> None:
    model = tiny("llama").train()
    time_models([model], WINDOW, rounds=1, warmup=0, new_tokens=1)
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds 0: must be at least 1"),
        ({"warmup": -1}, "warmup -1: must be at least 0"),
        ({"new_tokens": 0}, "new_tokens 0: must be at least 1"),
    ],
)
def test_counts_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        time_models([tiny("llama")], WINDOW, **options)


def test_no_model_is_refused() -> None:
    with pytest.raises(DataError, match="models 0"):
        time_models([], WINDOW)
