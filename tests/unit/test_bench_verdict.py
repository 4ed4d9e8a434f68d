"""The sentences on what is not faster, from made-up evidence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ffsplit.bench.verdict import Evidence, ffn_verdict, model_verdict

SLOW = Evidence(
    tokens=16,
    speed=0.8,
    bound="memory",
    roofline=0.2,
    bytes_ratio=0.3,
    macs_ratio=1.0,
    operations=5,
    dense_operations=5,
    calls_share=0.1,
)


def test_what_is_faster_needs_no_excuse() -> None:
    assert ffn_verdict(replace(SLOW, speed=1.5)) is None
    assert model_verdict("decode", 1.5, 3.0, 2.0) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoded": True}, "dequantisation path"),
        ({"kept": True}, "decoded once and are kept"),
        ({"operations": 30, "calls_share": 0.7}, "bound by launches: 30 operations against 5"),
        ({"masked": True}, "no kernel skips their work"),
        ({"bound": "compute"}, "compute-bound: the dense FFN is limited by multiply-accumulates"),
        ({"bytes_ratio": 1.0}, "as many bytes move as before"),
        ({}, "reach only 20% of the roofline"),
        ({"roofline": 0.9}, "too small to show"),
    ],
)
def test_every_reason_has_its_sentence(changes: dict[str, object], words: str) -> None:
    told = ffn_verdict(replace(SLOW, **changes))  # type: ignore[arg-type]
    assert told is not None
    assert told.startswith("SLOWER (x0.80) at 16 tokens: ")
    assert words in told


def test_about_equal_is_not_called_slower() -> None:
    told = ffn_verdict(replace(SLOW, speed=1.0, tokens=1))
    assert told is not None
    assert told.startswith("NOT faster (x1.00) at 1 token: ")


def test_a_model_with_few_ffns_is_told_amdahls_limit() -> None:
    told = model_verdict("prefill of 16 tokens", 0.99, 1.1, 3.0)
    assert told is not None
    assert "FFNs are only 9% of the dense model's time, so none can give more than x1.10" in told


def test_a_model_with_slow_ffns_is_told_so() -> None:
    told = model_verdict("decode", 0.6, 2.0, 0.5)
    assert told is not None
    assert "not faster themselves (x0.50" in told


def test_a_model_whose_saving_is_hidden_is_told_so() -> None:
    told = model_verdict("decode", 1.0, 1.6, 1.5)
    assert told is not None
    assert "hides what its FFNs save, x1.50 alone" in told
