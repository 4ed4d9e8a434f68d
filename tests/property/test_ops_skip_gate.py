"""Thresholds that skip no more than asked, and costs that mean what they say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffsplit.ops.skip_gate import FLOOR, share_threshold, skip_cost

SCORES = st.lists(st.integers(-5, 5) | st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60)


@given(values=SCORES, share=st.floats(0, 0.999))
def test_at_most_the_share_is_skipped_and_ties_stay_together(values: list[float], share: float) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    threshold = torch.tensor(share_threshold(scores, share), dtype=torch.float32)
    skipped = int((scores <= threshold).sum())
    wanted = min(round(share * len(values)), len(values) - 1)
    assert skipped <= wanted
    ordered = sorted(values)
    assert skipped == sum(value < torch.tensor(ordered[wanted], dtype=torch.float32) for value in scores)


@given(seed=st.integers(0, 99), tokens=st.integers(1, 300), share=st.floats(0, 0.99))
def test_distinct_scores_are_skipped_in_exactly_the_share(seed: int, tokens: int, share: float) -> None:
    scores = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed)).float() / 7 - 3
    skipped = scores <= share_threshold(scores, share)
    assert int(skipped.sum()) == min(round(share * tokens), tokens - 1)
    if skipped.any():
        assert float(scores[skipped].max()) < float(scores[~skipped].min())


def test_costs() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    missed = torch.tensor([[0.0, 10.0], [1.0, 0.0], [0.0, 0.0]])
    assert skip_cost(x, missed, "energy").tolist() == [100.0, 1.0, 0.0]
    assert skip_cost(x, missed, "norm").tolist() == pytest.approx([math.log(2), 0.0, 0.5 * math.log(FLOOR)])
