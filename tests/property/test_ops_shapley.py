from __future__ import annotations

from collections.abc import Collection
from itertools import permutations
from math import factorial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffsplit.ops.likelihood import next_token_losses
from ffsplit.ops.shapley import shapley_values
from tests.property.amount import examples

properties = examples(40)


def sampled(players: list[int], cost: object, count: int, seed: int = 0) -> dict[int, float]:
    return shapley_values(players, cost, count, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


@given(worth=st.lists(st.floats(-5, 5), min_size=1, max_size=6), count=st.integers(1, 5), seed=st.integers(0, 99))
@properties
def test_in_an_additive_game_it_is_exact(worth: list[float], count: int, seed: int) -> None:
    players = [3 * place for place in range(len(worth))]
    values = sampled(players, lambda gone: sum(worth[player // 3] for player in gone), count, seed)
    assert [values[player] for player in players] == pytest.approx(worth, abs=1e-9)


@given(table=st.lists(st.floats(-3, 3), min_size=16, max_size=16), count=st.integers(1, 6), seed=st.integers(0, 99))
@properties
def test_the_values_share_out_the_whole_cost(table: list[float], count: int, seed: int) -> None:
    def cost(gone: Collection[int]) -> float:
        return table[sum(1 << player for player in gone)]

    values = sampled([0, 1, 2, 3], cost, count, seed)
    assert sum(values.values()) == pytest.approx(table[15] - table[0], abs=1e-9)


def test_with_many_orders_it_comes_near_the_definition() -> None:
    """Two that can stand in for each other, and one that nobody needs."""

    def cost(gone: Collection[int]) -> float:
        return 6.0 * (0 in gone and 1 in gone) + 1.0 * (3 in gone)

    exact = dict.fromkeys(range(4), 0.0)
    for order in permutations(range(4)):
        for place, player in enumerate(order):
            exact[player] += (cost(order[: place + 1]) - cost(order[:place])) / factorial(4)
    values = sampled([0, 1, 2, 3], cost, 400)
    assert exact == pytest.approx({0: 3.0, 1: 3.0, 2: 0.0, 3: 1.0})
    assert values == pytest.approx(exact, abs=0.3)
    assert values[2] == 0.0
    assert sampled([0, 1, 2, 3], cost, 4, 1) == sampled([0, 1, 2, 3], cost, 4, 1)


def test_a_pair_of_reversed_orders_is_exact_for_two() -> None:
    assert sampled([0, 1], lambda gone: 6.0 * (len(gone) == 2), 2) == {0: 3.0, 1: 3.0}


def test_losses_by_hand_and_without_the_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(2, 5, 7, generator=generator), torch.randint(0, 7, (2, 5), generator=generator)
    real = torch.tensor([[True] * 5, [True, True, True, False, False]])
    log_p = logits.log_softmax(-1)
    expected = [
        -sum(float(log_p[0, place, ids[0, place + 1]]) for place in range(4)) / 4,
        -sum(float(log_p[1, place, ids[1, place + 1]]) for place in range(2)) / 2,
    ]
    assert next_token_losses(logits, ids, real).tolist() == pytest.approx(expected, rel=1e-5)
    left = next_token_losses(logits.flip(1), ids.flip(1), real.flip(1))
    assert bool(torch.isfinite(left).all())
    assert next_token_losses(logits[:, :1], ids[:, :1], real[:, :1]).tolist() == [0.0, 0.0]
