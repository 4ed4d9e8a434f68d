from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffsplit.errors import RecipeError
from ffsplit.ops.lowrank import svd_factors, whitened_factors
from ffsplit.ops.ranks import allocate_ranks, truncation_spectrum, uniform_rank, weighted_ranks


def falling(lengths: list[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=generator, dtype=torch.float64).sort(descending=True).values for n in lengths]


def loss(spectra: list[Tensor], ranks: tuple[int, ...] | list[int]) -> float:
    return sum(float(spectrum[rank:].sum()) for spectrum, rank in zip(spectra, ranks, strict=True))


def spent(ranks: tuple[int, ...] | list[int], costs: list[int]) -> int:
    return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))


problems = {
    "lengths": st.lists(st.integers(0, 6), min_size=1, max_size=3),
    "budget": st.integers(0, 60),
    "seed": st.integers(0, 2**20),
}


@given(out=st.integers(1, 8), inner=st.integers(1, 8), seed=st.integers(0, 2**20), whitened=st.booleans())
def test_the_spectrum_is_the_loss_of_every_rank(out: int, inner: int, seed: int, whitened: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inner, generator=generator, dtype=torch.float64)
    x = torch.randn(30, inner, generator=generator, dtype=torch.float64)
    gram = x.T @ x if whitened else None
    spectrum = truncation_spectrum(weight, gram)
    assert len(spectrum) == min(out, inner)
    for rank in range(min(out, inner) + 1):
        a, b = svd_factors(weight, rank) if gram is None else whitened_factors(weight, gram, rank)
        error = weight - a @ b
        lost = float((error if gram is None else error @ x.T).square().sum())
        assert float(spectrum[rank:].sum()) == pytest.approx(lost, rel=1e-5, abs=1e-7)


@given(cost=st.integers(1, 9), floor=st.sampled_from([0.0, 0.5, 1.0]), **problems)
def test_equal_costs_give_the_optimum_above_the_floor(
    cost: int, floor: float, lengths: list[int], budget: int, seed: int
) -> None:
    spectra, costs = falling(lengths, seed), [cost] * len(lengths)
    least = [min(int(floor * uniform_rank(lengths, costs, budget)), n) for n in lengths]
    found = allocate_ranks(spectra, costs, budget, floor)
    choices = product(*(range(low, n + 1) for low, n in zip(least, lengths, strict=True)))
    best = min(loss(spectra, ranks) for ranks in choices if spent(ranks, costs) <= budget)
    assert loss(spectra, found) == pytest.approx(best, abs=1e-12)
    assert spent(found, costs) <= budget


@given(costs=st.lists(st.integers(1, 9), min_size=3, max_size=3), **problems)
def test_nothing_cheaper_is_better_until_money_runs_out(
    costs: list[int], lengths: list[int], budget: int, seed: int
) -> None:
    """With unequal costs the greedy choice is within one rank of the bound that fractions of ranks would reach."""
    spectra, costs = falling(lengths, seed), costs[: len(lengths)]
    found = allocate_ranks(spectra, costs, budget, 0.0)
    assert spent(found, costs) <= budget
    steps = sorted(
        ((float(gain) / cost, float(gain), cost) for s, cost in zip(spectra, costs, strict=True) for gain in s),
        reverse=True,
    )
    bound, left = sum(float(s.sum()) for s in spectra), budget
    for _, gain, cost in steps:
        share = min(1.0, left / cost)
        bound, left = bound - share * gain, left - min(cost, left)
    dearest = max((gain for _, gain, _ in steps), default=0.0)
    assert bound - 1e-9 <= loss(spectra, found) <= bound + dearest + 1e-9
    # Every matrix that could still be paid for is at its limit.
    left = budget - spent(found, costs)
    assert all(rank == n or cost > left for rank, n, cost in zip(found, lengths, costs, strict=True))


@given(floor=st.floats(0, 1), **problems)
def test_no_matrix_falls_below_its_floor(floor: float, lengths: list[int], budget: int, seed: int) -> None:
    spectra, costs = falling(lengths, seed), [1 + n for n in lengths]
    found = allocate_ranks(spectra, costs, budget, floor)
    uniform = uniform_rank(lengths, costs, budget)
    assert all(rank >= min(int(floor * uniform), n) for rank, n in zip(found, lengths, strict=True))
    assert spent(found, costs) <= budget


def test_a_floor_of_one_leaves_the_uniform_rank_and_what_is_left_over() -> None:
    spectra = falling([8, 8, 8], 0)
    assert allocate_ranks(spectra, [3, 3, 3], 36, 1.0) == [4, 4, 4]
    assert sorted(allocate_ranks(spectra, [3, 3, 3], 39, 1.0)) == [4, 4, 5]


@pytest.mark.parametrize(
    ("costs", "budget", "floor"), [([1], 5, 0.5), ([1, 0], 5, 0.5), ([1, 1], -1, 0.5), ([1, 1], 5, 1.5)]
)
def test_impossible_allocations_are_refused(costs: list[int], budget: int, floor: float) -> None:
    with pytest.raises(RecipeError):
        allocate_ranks(falling([3, 3], 0), costs, budget, floor)


@given(
    weights=st.lists(st.floats(0.05, 20), min_size=2, max_size=3),
    limits=st.lists(st.integers(1, 12), min_size=3, max_size=3),
    costs=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    extra=st.integers(0, 150),
)
def test_weighted_ranks_are_in_proportion_and_cannot_grow(
    weights: list[float], limits: list[int], costs: list[int], extra: int
) -> None:
    limits, costs = limits[: len(weights)], costs[: len(weights)]
    budget = sum(costs) + extra
    found = weighted_ranks(weights, limits, costs, budget)
    assert spent(found, costs) <= budget
    assert all(1 <= rank <= limit for rank, limit in zip(found, limits, strict=True))
    # Brute force over every scale at which a rank changes.
    scales = [rank / weight for weight in weights for rank in range(1, 13)]
    for scale in scales:
        ranks = [max(1, min(int(scale * weight + 1e-9), limit)) for weight, limit in zip(weights, limits, strict=True)]
        if spent(ranks, costs) <= budget:
            assert all(mine >= other for mine, other in zip(found, ranks, strict=True))


@given(limit=st.integers(1, 30), cost=st.integers(1, 9), extra=st.integers(0, 500), weight=st.floats(0.1, 10))
def test_equal_weights_are_the_uniform_rank(limit: int, cost: int, extra: int, weight: float) -> None:
    budget = 3 * cost + extra
    found = weighted_ranks([weight] * 3, [limit] * 3, [cost] * 3, budget)
    assert found == [uniform_rank([limit] * 3, [cost] * 3, budget)] * 3


def test_a_budget_below_rank_one_is_refused() -> None:
    with pytest.raises(RecipeError, match="budget=5 is below 6"):
        weighted_ranks([1.0, 2.0, 3.0], [4, 4, 4], [2, 2, 2], 5)
