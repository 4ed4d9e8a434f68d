"""The knapsack against brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffsplit.budget.knapsack import choose, front
from ffsplit.errors import BudgetError

Row = list[float]
values = st.integers(0, 80).map(lambda eighths: eighths / 8)
layers = st.lists(st.lists(st.tuples(values, values), min_size=1, max_size=4), min_size=1, max_size=4)


def split(problem: list[list[tuple[float, float]]]) -> tuple[list[Row], list[Row]]:
    return [[d for d, _ in row] for row in problem], [[c for _, c in row] for row in problem]


def total(rows: list[Row], plan: tuple[int, ...] | list[int]) -> float:
    return sum(row[index] for row, index in zip(rows, plan, strict=True))


@given(problem=layers, share=st.floats(0, 1))
def test_no_other_choice_within_the_limit_is_better(problem: list[list[tuple[float, float]]], share: float) -> None:
    damages, costs = split(problem)
    least, most = sum(map(min, costs)), sum(map(max, costs))
    limit = least + share * (most - least) + 1e-6
    chosen = choose(damages, costs, limit)
    assert total(costs, chosen) <= limit * (1 + 1e-9)
    best = min(total(damages, plan) for plan in product(*map(range, map(len, costs))) if total(costs, plan) <= limit)
    assert total(damages, chosen) <= best + 1e-4 * max(1.0, best)


def test_what_is_out_of_reach_is_refused() -> None:
    with pytest.raises(BudgetError, match="cost 5 together and 4"):
        choose([[0.0, 1.0], [0.0]], [[9.0, 2.0], [3.0]], 4.0)


@pytest.mark.parametrize("over", [1e-6, 1e-7, 1e-8])
def test_a_hair_above_the_limit_is_above_it(over: float) -> None:
    assert choose([[0.0, 1.0], [0.0, 1.0]], [[1.0 + over, 0.5], [1.0, 0.5]], 2.0) in ([0, 1], [1, 0])
    assert choose([[0.0, 1.0]], [[2.0 + over, 2.0]], 2.0) == [1]


def test_a_limit_that_rounding_put_below_a_whole_number_is_that_number() -> None:
    assert 0.29 * 100 < 29
    assert choose([[0.0, 1.0]], [[29.0, 29.0]], 0.29 * 100) == [0]


def test_infinite_damage_is_never_chosen() -> None:
    assert choose([[np.inf, 2.0], [np.inf, 1.0]], [[0.0, 1.0], [0.0, 1.0]], 2.0) == [1, 1]
    with pytest.raises(BudgetError):
        choose([[np.inf, 2.0]], [[0.0, 1.0]], 0.5)


def test_a_limit_that_all_can_meet_costs_nothing() -> None:
    assert choose([[0.0, 3.0], [0.0, 1.0]], [[10.0, 1.0], [10.0, 1.0]], 20.0) == [0, 0]


@given(problem=layers)
def test_each_point_of_the_front_is_the_best_of_its_cost(problem: list[list[tuple[float, float]]]) -> None:
    damages, costs = split(problem)
    points = front(damages, costs)
    assert total(costs, points[0]) == pytest.approx(sum(map(min, costs)), abs=1e-6)
    for plan in points:
        spent = total(costs, plan)
        rivals = [p for p in product(*map(range, map(len, costs))) if total(costs, p) <= spent + 1e-9]
        assert total(damages, plan) <= min(total(damages, p) for p in rivals) + 1e-5
    spends = [total(costs, plan) for plan in points]
    assert spends == sorted(spends)
