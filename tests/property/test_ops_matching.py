from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffsplit.ops.matching import best_assignment, correlation, linear_cka, token_gram, unexplained_energy

SEEDS = st.integers(0, 2**31)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlations(h: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    first, second = (h.sum(0), h.square().sum(0)), (g.sum(0), g.square().sum(0))
    return correlation(h.T @ g, first, second, float(len(h)))


@given(seed=SEEDS, size=st.integers(0, 6))
def test_no_permutation_is_better(seed: int, size: int) -> None:
    similarity = random(seed, size, size)
    found = best_assignment(similarity)
    assert sorted(found.tolist()) == list(range(size))
    best = max(sum(float(similarity[i, j]) for i, j in enumerate(p)) for p in permutations(range(size)))
    assert abs(sum(float(similarity[i, j]) for i, j in enumerate(found)) - best) < 1e-9


@given(seed=SEEDS, size=st.integers(1, 12))
def test_a_permutation_is_found_again(seed: int, size: int) -> None:
    h = random(seed, 40, size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(best_assignment(correlations(h, h[:, order])), order.argsort())


@given(seed=SEEDS, tokens=st.integers(3, 20), shift=st.floats(-50, 50))
def test_correlations_are_those_of_numpy(seed: int, tokens: int, shift: float) -> None:
    h, g = random(seed, tokens, 4) + shift, random(seed + 1, tokens, 3)
    expected = np.corrcoef(h.numpy(), g.numpy(), rowvar=False)[:4, 4:]
    np.testing.assert_allclose(correlations(h, g).numpy(), expected, atol=1e-6)


@given(seed=SEEDS, tokens=st.integers(1, 5))
def test_constant_neurons_correlate_with_nothing(seed: int, tokens: int) -> None:
    h = torch.cat([random(seed, tokens, 2), torch.zeros(tokens, 1), torch.full((tokens, 1), 3.0)], dim=1).double()
    found = correlations(h, h)
    assert bool(torch.isfinite(found).all())
    assert float(found[2:].abs().max()) == 0
    assert float(found.abs().max()) <= 1


@given(seed=SEEDS, tokens=st.integers(1, 9))
def test_unexplained_energy_is_the_residual_of_numpy(seed: int, tokens: int) -> None:
    mine, theirs = random(seed, tokens, 3).double(), random(seed + 1, tokens, 3).double()
    theirs[:, 2] = 0.0
    found = unexplained_energy(mine.square().sum(0), theirs.square().sum(0), (mine * theirs).sum(0))
    for column in range(3):
        g, h = mine[:, column].numpy(), theirs[:, column].numpy()
        best = g - h * np.linalg.lstsq(h[:, None], g, rcond=None)[0]
        assert float(found[column]) == pytest.approx(float(best @ best), rel=1e-6, abs=1e-9)


@given(seed=SEEDS, tokens=st.integers(2, 10), scale=st.floats(0.1, 10))
def test_cka_sees_no_rotation_scale_or_shift(seed: int, tokens: int, scale: float) -> None:
    h, g = random(seed, tokens, 5), random(seed + 1, tokens, 7)
    rotation = torch.linalg.qr(random(seed + 2, 7, 7)).Q
    first, second = token_gram(h), token_gram(g)
    value = linear_cka(first, second)
    assert -1e-9 <= value <= 1 + 1e-9
    assert abs(linear_cka(first, token_gram(scale * g @ rotation + 3)) - value) < 1e-8
    assert abs(linear_cka(second, second) - 1) < 1e-9


def test_cka_of_features_is_the_definition() -> None:
    h, g = random(0, 30, 4), random(1, 30, 6)
    x, y = h - h.mean(0), g - g.mean(0)
    expected = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert abs(linear_cka(token_gram(h), token_gram(g)) - float(expected)) < 1e-9


def test_cka_of_a_constant_layer_is_zero() -> None:
    assert linear_cka(token_gram(torch.ones(5, 3)), token_gram(random(0, 5, 3))) == 0
