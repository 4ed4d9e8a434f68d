"""Sharing out bits inside one FFN against brute force."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffsplit.errors import BudgetError
from ffsplit.ops.allocation import split_by_bits

ERROR = {8: 1e-4, 4: 0.02, 3: 0.08, 2: 0.3}
COST = {bits: bits + 0.3 for bits in ERROR}


def damage(energy: list[float], counts: dict[int, int]) -> float:
    ordered, start, total = sorted(energy, reverse=True), 0, 0.0
    for bits, count in counts.items():
        total += ERROR[bits] * sum(ordered[start : start + count])
        start += count
    return total


def spent(counts: dict[int, int]) -> float:
    return sum(COST[bits] * count for bits, count in counts.items()) / sum(counts.values())


@given(
    energy=st.lists(st.floats(0, 100, width=32), min_size=1, max_size=12),
    target=st.floats(2.3, 9.0),
    group=st.integers(1, 4),
)
def test_the_target_is_met_and_every_neuron_has_a_width(energy: list[float], target: float, group: int) -> None:
    counts = split_by_bits(torch.tensor(energy), ERROR, COST, target, group)
    assert sum(counts.values()) == len(energy)
    assert list(counts) == sorted(counts, reverse=True)
    assert spent(counts) <= target + 1e-9


@given(energy=st.lists(st.floats(0.125, 100, width=32), min_size=2, max_size=7), target=st.floats(2.4, 8.2))
def test_close_to_the_best_split_of_all(energy: list[float], target: float) -> None:
    """The price meets every target on the convex hull exactly; between two of its points one group is in question."""
    counts = split_by_bits(torch.tensor(energy), ERROR, COST, target, 1)
    widths = sorted(ERROR, reverse=True)
    best = min(
        damage(energy, {bits: plan.count(bits) for bits in widths})
        for plan in combinations_with_replacement(widths, len(energy))
        if sum(COST[bits] for bits in plan) / len(plan) <= target
    )
    assert damage(energy, counts) <= best + ERROR[2] * max(energy)


def test_heavier_neurons_get_more() -> None:
    counts = split_by_bits(torch.tensor([100.0] * 4 + [1.0] * 4), ERROR, COST, 4.0, 2)
    assert counts[max(counts)] >= 2
    assert max(counts) > min(counts)


def test_out_of_reach() -> None:
    with pytest.raises(BudgetError, match=r"cheapest width costs 2\.300"):
        split_by_bits(torch.ones(4), ERROR, COST, 2.0, 2)


def test_equal_neurons_fill_the_budget() -> None:
    counts = split_by_bits(torch.ones(100), ERROR, COST, 3.8, 1)
    assert 3.75 <= spent(counts) <= 3.8
