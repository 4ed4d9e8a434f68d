from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffsplit.ops.thresholds import greedy_shares

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=4)
TARGETS = st.floats(0, 1)


def average(sizes: Sequence[int], shares: Sequence[float]) -> float:
    return sum(size * share for size, share in zip(sizes, shares, strict=True)) / sum(sizes)


@given(sizes=SIZES, target=TARGETS, step=st.floats(0.02, 1), weights=st.lists(st.floats(0, 9), min_size=4, max_size=4))
def test_the_average_is_the_target(sizes: list[int], target: float, step: float, weights: list[float]) -> None:
    shares = greedy_shares(lambda s: sum(w * x * x for w, x in zip(weights, s, strict=False)), sizes, target, step)
    assert average(sizes, shares) == pytest.approx(target, abs=1e-8)
    assert all(0 <= share <= 1 for share in shares)


@given(weights=st.lists(st.floats(0.1, 9), min_size=3, max_size=3))
def test_a_convex_error_is_minimised(weights: list[float]) -> None:
    """With equal sizes and separable convex errors, greedy steps are optimal among all allocations on their grid."""

    def error(shares: Sequence[float]) -> float:
        return sum(w * s * s for w, s in zip(weights, shares, strict=True))

    found = greedy_shares(error, [5, 5, 5], 0.3, 0.1)
    grid = [[0.3 * n for n in counts] for counts in itertools.product(range(4), repeat=3) if sum(counts) == 3]
    assert error(found) == pytest.approx(min(map(error, grid)))


def test_what_costs_nothing_is_spared_first() -> None:
    assert greedy_shares(lambda s: s[0] + 2 * s[2], [1, 2, 1], 0.5, 0.1) == pytest.approx([0, 1, 0])
    assert greedy_shares(lambda s: s[0] + 2 * s[2], [1, 2, 1], 0.75, 0.1) == pytest.approx([1, 1, 0])
    assert greedy_shares(lambda s: 0.0, [3, 4], 0.0, 0.1) == [0.0, 0.0]
