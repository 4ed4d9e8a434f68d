"""Properties of chart axes."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ffsplit.report.chart import spread
from ffsplit.report.scale import scale_for, tick_labels

positive = st.floats(1e-3, 1e9)


@given(st.lists(positive, min_size=1, max_size=8), st.booleans(), st.booleans())
def test_values_and_ticks_lie_inside(values: list[float], zero: bool, log: bool) -> None:
    scale = scale_for(values, 300.0, 10.0, zero=zero, log=log)
    assert all(10 - 1e-6 <= scale(value) <= 300 + 1e-6 for value in values)
    assert all(10 - 1e-6 <= scale(tick) <= 300 + 1e-6 for tick in scale.ticks())


@given(st.lists(positive, min_size=2, max_size=8), st.booleans())
def test_the_order_is_kept(values: list[float], log: bool) -> None:
    scale = scale_for(values, 0.0, 100.0, log=log)
    places = [scale(value) for value in sorted(values)]
    assert all(left <= right + 1e-9 for left, right in pairwise(places))


@given(st.lists(positive, min_size=1, max_size=8), st.booleans(), st.integers(3, 8))
def test_there_are_some_ticks_but_not_many(values: list[float], log: bool, count: int) -> None:
    ticks = scale_for(values, 0.0, 100.0, log=log).ticks(count)
    assert 1 <= len(ticks) <= 2 * count + 2
    assert ticks == sorted(set(ticks))
    assert len(set(tick_labels(ticks))) == len(ticks)


@given(st.lists(st.floats(0, 300), max_size=8), st.floats(1, 20))
def test_spread_places_keep_their_distance_and_their_centre(places: list[float], gap: float) -> None:
    moved = spread(places, gap)
    ordered = sorted(moved)
    assert all(after - before >= gap - 1e-6 for before, after in pairwise(ordered))
    if places:
        assert abs(sum(moved) - sum(places)) < 1e-6 * (1 + sum(places))
