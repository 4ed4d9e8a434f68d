from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffsplit.errors import RecipeError
from ffsplit.ops.least_squares import (
    affine_fit,
    affine_reduced_rank_fit,
    reduced_rank_regression,
    refit_down,
    refit_from_gram,
    residual_energy,
)
from tests.property.amount import examples

properties = examples(50)
seeds = st.integers(0, 2**20)


def data(tokens: int, inputs: int, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    return x + x.roll(1, 1), torch.randn(tokens, outputs, generator=generator, dtype=torch.float64)


@properties
@given(inputs=st.integers(1, 8), outputs=st.integers(1, 6), seed=seeds)
def test_without_ridge_it_is_lstsq(inputs: int, outputs: int, seed: int) -> None:
    x, y = data(40, inputs, outputs, seed)
    expected = torch.linalg.lstsq(x, y, driver="gelsd").solution
    assert torch.allclose(x @ refit_down(x.T @ x, x.T @ y, 0.0).T, x @ expected, atol=1e-6)


@properties
@given(ridge=st.floats(1e-3, 10.0), seed=seeds)
def test_ridge_is_an_augmented_lstsq(ridge: float, seed: int) -> None:
    x, y = data(12, 5, 3, seed)
    prior = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    root = (ridge * (x.T @ x).diagonal().mean()).sqrt()
    stacked = torch.cat([x, root * torch.eye(5, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, torch.cat([y, root * prior.T])).solution.T
    assert torch.allclose(refit_down(x.T @ x, x.T @ y, ridge, prior), expected, atol=1e-8)
    assert not torch.allclose(refit_down(x.T @ x, x.T @ y, ridge), expected, atol=1e-8)


@properties
@given(d_ff=st.integers(2, 12), tokens=st.integers(1, 30), data_=st.data(), seed=seeds)
def test_refit_never_loses_to_no_refit(d_ff: int, tokens: int, data_: st.DataObject, seed: int) -> None:
    h, _ = data(tokens, d_ff, 1, seed)
    h[:, 0] = 0.0
    down = torch.randn(4, d_ff, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = torch.tensor(data_.draw(st.lists(st.integers(0, d_ff - 1), unique=True, max_size=d_ff)), dtype=torch.int64)
    target = h @ down.T
    before = (h[:, kept] @ down[:, kept].T - target).square().sum()
    for ridge in (0.0, 1e-6, 1e-2):
        weight = refit_from_gram(h.T @ h, kept, down, ridge)
        assert weight.shape == (4, len(kept))
        after = (h[:, kept] @ weight.T - target).square().sum()
        assert after <= before * (1 + 1e-9) + 1e-9


@properties
@given(seed=seeds)
def test_keeping_all_neurons_changes_nothing(seed: int) -> None:
    h, _ = data(6, 9, 1, seed)
    down = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.allclose(refit_from_gram(h.T @ h, torch.arange(9), down, 1e-3), down, atol=1e-10)


@properties
@given(seed=seeds, shift=st.floats(-5, 5))
def test_affine_fit_equals_lstsq_with_a_column_of_ones(seed: int, shift: float) -> None:
    x, y = data(50, 4, 3, seed)
    x = x[:, :4] + shift
    stacked = torch.cat([x, torch.ones(50, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(stacked, y, driver="gelsd").solution
    weight, bias = affine_fit(x.T @ x, x.T @ y, x.sum(0), y.sum(0), 50, 0.0)
    assert torch.allclose(x @ weight.T + bias, stacked @ expected, atol=1e-6)


@properties
@given(tokens=st.integers(1, 20), seed=seeds)
def test_residual_energy_equals_the_direct_sum(tokens: int, seed: int) -> None:
    x, y = data(tokens, 5, 3, seed)
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = float((x @ weight.T - y).square().sum())
    assert float(residual_energy(x.T @ x, x.T @ y, y.square().sum(), weight)) == pytest.approx(expected, rel=1e-9)


@properties
@given(inputs=st.integers(1, 7), outputs=st.integers(1, 7), seed=seeds)
def test_reduced_rank_regression_is_optimal(inputs: int, outputs: int, seed: int) -> None:
    x, y = data(40, inputs, outputs, seed)
    if inputs > 1:
        x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    gram, cross, energy = x.T @ x, x.T @ y, y.square().sum()
    full = torch.linalg.lstsq(x, y).solution
    values = torch.linalg.svdvals(x @ full)
    floor = (x @ full - y).square().sum()
    for rank in range(min(inputs, outputs) + 1):
        a, b = reduced_rank_regression(gram, cross, rank, 0.0)
        assert a.shape == (outputs, rank)
        assert b.shape == (rank, inputs)
        expected = float(floor + values[rank:].square().sum())
        assert float(residual_energy(gram, cross, energy, a @ b)) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dead_neurons_keep_their_prior(dtype: torch.dtype) -> None:
    gram, cross, prior = torch.zeros(3, 3, dtype=dtype), torch.zeros(3, 2, dtype=dtype), torch.ones(2, 3, dtype=dtype)
    gram[0, 0], cross[0] = 4.0, 8.0
    for ridge in (0.0, 1e-6):
        weight = refit_down(gram, cross, ridge, prior)
        assert weight.dtype == torch.float64
        assert torch.allclose(weight, torch.tensor([[2.0, 1.0, 1.0]] * 2, dtype=torch.float64), atol=1e-5)
    assert torch.equal(refit_down(gram * 0, cross * 0, 0.0, prior), prior.double())


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(RecipeError, match="rank=3"):
        reduced_rank_regression(torch.eye(4), torch.ones(4, 2), 3, 0.0)
    with pytest.raises(RecipeError, match="count=0"):
        affine_fit(torch.eye(2), torch.ones(2, 2), torch.ones(2), torch.ones(2), 0, 0.0)


@properties
@given(rank=st.integers(0, 3), seed=seeds)
def test_an_affine_low_rank_fit_is_the_best_there_is(rank: int, seed: int) -> None:
    """Eckart-Young on the fitted values of the centred problem, by plain SVD."""
    x, y = data(40, 5, 3, seed)
    x, y = x + 2.0, y + x[:, :3] - 1.0
    a, b, bias = affine_reduced_rank_fit(x.T @ x, x.T @ y, x.sum(0), y.sum(0), 40, rank, 0.0)
    fitted = (x - x.mean(0)) @ torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution
    u, s, v = torch.linalg.svd(fitted, full_matrices=False)
    expected = y.mean(0) + (u[:, :rank] * s[:rank]) @ v[:rank]
    assert torch.allclose(x @ (a @ b).T + bias, expected, atol=1e-6)


@properties
@given(ridge=st.floats(0.0, 1.0), seed=seeds)
def test_at_full_rank_it_is_the_affine_fit(ridge: float, seed: int) -> None:
    x, y = data(30, 4, 4, seed)
    sums = (x.T @ x, x.T @ y, x.sum(0), y.sum(0), 30)
    weight, expected = affine_fit(*sums, ridge)
    a, b, bias = affine_reduced_rank_fit(*sums, 4, ridge)
    assert torch.allclose(a @ b, weight, atol=1e-8)
    assert torch.allclose(bias, expected, atol=1e-8)


def test_an_affine_low_rank_fit_needs_tokens_and_a_possible_rank() -> None:
    x, y = data(10, 3, 2, 0)
    sums = (x.T @ x, x.T @ y, x.sum(0), y.sum(0))
    with pytest.raises(RecipeError, match="count=0"):
        affine_reduced_rank_fit(*sums, 0, 1, 0.0)
    with pytest.raises(RecipeError, match="rank=3"):
        affine_reduced_rank_fit(*sums, 10, 3, 0.0)
