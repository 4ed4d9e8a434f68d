from __future__ import annotations

import pytest

from ffsplit.budget.grouping import Partition, choose, consecutive, merged, runs
from ffsplit.errors import BudgetError, RecipeError
from ffsplit.ffn.shape import FFNShape

NARROW, WIDE = FFNShape(8, 16, gated=False), FFNShape(8, 32, gated=False)


def stored(partition: Partition, rank: int) -> int:
    """Ten layers of 100; a shared one stores 40 and 5 a rank."""
    return 1000 - sum((len(group) - 1) * (60 - 5 * rank) for group in partition)


def test_runs_are_of_one_shape_and_one_stack() -> None:
    shapes = [NARROW] * 4 + [WIDE] * 3 + [NARROW]
    assert runs(shapes, 0, 0) == [(0, 1, 2, 3), (4, 5, 6)]
    assert runs(shapes, 2, 2) == [(2, 3), (4, 5)]
    assert runs([NARROW] * 5, 0, 0, ["encoder"] * 3 + ["decoder"] * 2) == [(0, 1, 2), (3, 4)]
    with pytest.raises(RecipeError, match=r"no two consecutive FFNs of equal shape .*protect_first=1"):
        runs([NARROW, NARROW], 1, 0)
    with pytest.raises(RecipeError, match="no two consecutive"):
        runs([NARROW, WIDE], 9, 9)


def test_consecutive_groups_grow() -> None:
    found = list(consecutive([(0, 1, 2, 3, 4), (6, 7)], None))
    assert found[0] == [(0, 1), (2, 3), (4,), (6, 7)]
    assert found[1] == [(0, 1, 2), (3, 4), (6, 7)]
    assert found[-1] == [(0, 1, 2, 3, 4), (6, 7)]
    assert list(consecutive([(0, 1, 2)], 2)) == [[(0, 1), (2,)]]


def test_the_most_similar_neighbours_merge_first() -> None:
    closeness = {(2, 3): 0.9, (0, 1): 0.8, (1, 2): 0.1, (0, 2): 0.2, (0, 3): 0.2, (1, 3): 0.1, (5, 6): 0.5}
    found = list(merged([(0, 1, 2, 3), (5, 6)], None, lambda i, j: closeness[i, j]))
    assert [[group for group in partition if len(group) > 1] for partition in found] == [
        [(2, 3)], [(0, 1), (2, 3)], [(0, 1), (2, 3), (5, 6)], [(0, 1, 2, 3), (5, 6)],
    ]  # fmt: skip
    limited = list(merged([(0, 1, 2, 3)], 2, lambda i, j: closeness[i, j]))
    assert limited[-1] == [(0, 1), (2, 3)]


def test_the_rank_takes_what_is_left() -> None:
    partitions = list(consecutive([tuple(range(10))], None))
    assert choose(partitions, stored, 700, 1000, (0, 9)) == (partitions[0], 0)
    # 5 tied layers, 25 a rank: 99 spare numbers pay for rank 3
    assert choose(partitions, stored, 799, 1000, (0, 9)) == (partitions[0], 3)
    assert choose(partitions, stored, 799, 1000, (0, 2)) == (partitions[0], 2)
    assert choose(partitions, stored, 699, 1000, (0, 9)) == (partitions[1], 1)  # 6 tied: 640, 30 a rank
    assert choose(partitions, stored, 510, 1000, (1, 1)) == (partitions[-1], 1)


def test_an_unreachable_budget_names_the_smallest() -> None:
    partitions = list(consecutive([tuple(range(10))], None))
    with pytest.raises(BudgetError, match=r"smallest reachable keep is 0\.4600"):
        choose(partitions, stored, 450, 1000, (0, 9))
    assert choose(partitions, stored, 460, 1000, (0, 9)) == (partitions[-1], 0)
