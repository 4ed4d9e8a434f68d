"""Properties of the Pareto front."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from ffsplit.report.pareto import pareto_front

finite = st.floats(0, 100) | st.integers(0, 4).map(float)
points = st.lists(st.tuples(finite, finite), max_size=12)


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


@given(points)
def test_a_point_is_on_the_front_unless_another_dominates_it(cloud: list[tuple[float, float]]) -> None:
    assert pareto_front(cloud) == [not any(dominates(other, point) for other in cloud) for point in cloud]


@given(points.filter(len))
def test_the_extremes_are_on_the_front(cloud: list[tuple[float, float]]) -> None:
    on_front = dict(zip(cloud, pareto_front(cloud), strict=True))
    assert on_front[min(cloud)]
    assert on_front[min(cloud, key=lambda point: (point[1], point[0]))]


@given(points)
def test_every_point_off_the_front_is_dominated_by_one_on_it(cloud: list[tuple[float, float]]) -> None:
    flags = pareto_front(cloud)
    front = [point for point, on in zip(cloud, flags, strict=True) if on]
    for point, on in zip(cloud, flags, strict=True):
        assert on or any(dominates(best, point) for best in front)


@given(points, st.randoms(use_true_random=False))
def test_the_order_of_points_does_not_matter(cloud: list[tuple[float, float]], random) -> None:
    order = list(range(len(cloud)))
    random.shuffle(order)
    flags = pareto_front(cloud)
    assert pareto_front([cloud[index] for index in order]) == [flags[index] for index in order]


@given(points, st.sampled_from([math.nan, math.inf]))
def test_a_point_that_is_not_finite_is_off_the_front_and_changes_nothing(
    cloud: list[tuple[float, float]], bad: float
) -> None:
    assert pareto_front([*cloud, (1.0, bad), (bad, 0.0)]) == [*pareto_front(cloud), False, False]
