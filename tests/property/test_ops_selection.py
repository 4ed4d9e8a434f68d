from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffsplit.errors import RecipeError
from ffsplit.ops import scores, selection
from ffsplit.ops.least_squares import refit_from_gram
from tests.property.amount import examples

properties = examples(30)
seeds = st.integers(0, 2**20)


def network(d_ff: int, d_model: int, seed: int, tokens: int = 60) -> tuple[Tensor, Tensor]:
    """Correlated activations of very different sizes, and a random ``down``."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, d_ff, generator=generator, dtype=torch.float64)
    h = h @ torch.randn(d_ff, d_ff, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, d_ff)
    return h, torch.randn(d_model, d_ff, generator=generator, dtype=torch.float64)


def pruned_error(h: Tensor, down: Tensor, kept: Tensor) -> float:
    """Output energy lost when only ``kept`` neurons stay, with the best possible ``down``."""
    target = h @ down.T
    left, values, _ = torch.linalg.svd(h[:, kept], full_matrices=False)
    basis = left[:, values > 1e-9 * h.norm()]
    return float((target - basis @ (basis.T @ target)).square().sum())


def all_orders(gram: Tensor, down: Tensor, count: int, block: int = 1) -> dict[str, Tensor]:
    return {
        "leverage": selection.leverage(gram, 1e-2).topk(count).indices,
        "pivoted": selection.pivoted_qr_order(gram, count),
        "forward": selection.forward_selection_order(gram, down, count, block=block),
        "obs": selection.greedy_obs_order(gram, down, count, block=block),
    }


@properties
@given(d_ff=st.integers(1, 90), rank=st.integers(0, 12), block=st.integers(1, 9), data=st.data(), seed=seeds)
def test_orders_are_index_sets_even_for_singular_grams(
    d_ff: int, rank: int, block: int, data: st.DataObject, seed: int
) -> None:
    h, down = network(d_ff, 3, seed, tokens=rank)
    h[:, 0] = 0.0
    count = data.draw(st.integers(0, d_ff))
    for name, order in all_orders(h.T @ h, down, count, block).items():
        assert order.dtype == torch.int64, name
        assert order.shape == (count,), name
        assert len(set(order.tolist()) & set(range(d_ff))) == count, name
    assert sorted(selection.obs_ranking(h.T @ h, down, count, block=block).tolist()) == list(range(d_ff))


@properties
@given(d_ff=st.integers(2, 7), seed=seeds)
def test_obs_is_brute_force_backward_elimination(d_ff: int, seed: int) -> None:
    h, down = network(d_ff, 3, seed)
    ranking = selection.obs_ranking(h.T @ h, down, 1, ridge=0.0).tolist()
    left = list(range(d_ff))
    for removed in reversed(ranking[1:]):
        errors = {j: pruned_error(h, down, torch.tensor([i for i in left if i != j], dtype=torch.int64)) for j in left}
        assert errors[removed] <= min(errors.values()) * (1 + 1e-6)
        left.remove(removed)
    assert left == ranking[:1]


@properties
@given(d_ff=st.integers(2, 7), seed=seeds)
def test_forward_is_brute_force_forward_selection(d_ff: int, seed: int) -> None:
    h, down = network(d_ff, 3, seed)
    chosen: list[int] = []
    for picked in selection.forward_selection_order(h.T @ h, down, d_ff).tolist():
        left = [j for j in range(d_ff) if j not in chosen]
        errors = {j: pruned_error(h, down, torch.tensor([*chosen, j])) for j in left}
        assert errors[picked] <= min(errors.values()) + 1e-6 * pruned_error(h, down, torch.arange(0))
        chosen.append(picked)


@properties
@given(d_ff=st.integers(1, 100), seed=seeds)
def test_pivoted_order_is_that_of_a_pivoted_qr(d_ff: int, seed: int) -> None:
    h, _ = network(d_ff, 1, seed, tokens=120)
    order = selection.pivoted_qr_order(h.T @ h)
    residual = h.clone()
    for index in order[: min(d_ff, 70)].tolist():
        norms = residual.norm(dim=0)
        assert norms[index] >= norms.max() * (1 - 1e-6)
        direction = residual[:, index] / norms[index]
        residual -= torch.outer(direction, direction @ residual)


@properties
@given(rank=st.integers(0, 20), seed=seeds)
def test_pivoted_order_stops_at_the_numerical_rank(rank: int, seed: int) -> None:
    h, _ = network(100, 1, seed, tokens=rank)
    assert len(selection.pivoted_qr_order(h.T @ h, tol=1e-4)) == rank


@properties
@given(d_ff=st.integers(2, 9), seed=seeds)
def test_exact_copies_are_pruned_for_free(d_ff: int, seed: int) -> None:
    h, down = network(d_ff, 3, seed)
    doubled, both = torch.cat([h, 2 * h], 1), torch.cat([down, down.flip(0)], 1)
    gram = doubled.T @ doubled
    for order in (
        selection.forward_selection_order(gram, both, d_ff),
        selection.greedy_obs_order(gram, both, d_ff, ridge=1e-9),
    ):
        assert pruned_error(doubled, both, order) <= 1e-6 * pruned_error(doubled, both, torch.arange(0))


def test_greedy_orders_beat_leverage_on_correlated_data() -> None:
    wins = 0
    for seed, keep in itertools.product(range(10), (8, 16)):
        h, down = network(48, 12, seed, tokens=400)
        gram = h.T @ h
        errors = {name: pruned_error(h, down, kept) for name, kept in all_orders(gram, down, keep).items()}
        assert min(errors["forward"], errors["obs"]) <= errors["leverage"]
        wins += errors["forward"] < errors["leverage"]
    assert wins >= 18


@pytest.mark.parametrize("block", [1, 4])
def test_many_blocks_of_updates_stay_accurate(block: int) -> None:
    h, down = network(200, 16, 0, tokens=1000)
    gram = h.T @ h
    for order in (
        selection.forward_selection_order(gram, down, 150, block=block),
        selection.greedy_obs_order(gram, down, 150, block=block),
    ):
        refitted = refit_from_gram(gram, order, down, 1e-12)
        lost = float((h[:, order] @ refitted.T - h @ down.T).square().sum())
        random = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:150]
        assert lost < 0.5 * pruned_error(h, down, random)


@properties
@given(d_ff=st.integers(1, 12), seed=seeds)
def test_leverage_is_the_formula(d_ff: int, seed: int) -> None:
    h, _ = network(d_ff, 3, seed, tokens=6)
    gram = h.T @ h
    shifted = gram + 0.1 * gram.diagonal().mean() * torch.eye(d_ff, dtype=torch.float64)
    inverse = torch.linalg.inv(shifted)
    assert torch.allclose(selection.leverage(gram, 0.1), (gram @ inverse).diagonal(), atol=1e-9)


@properties
@given(d_ff=st.integers(1, 12), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), seed=seeds)
def test_scores_follow_a_permutation_of_the_neurons(d_ff: int, dtype: torch.dtype, seed: int) -> None:
    h, down = network(d_ff, 3, seed)
    up, moments, down = h[:3].T.to(dtype), h.square().mean(0).to(dtype), down.to(dtype)
    perm = torch.randperm(d_ff, generator=torch.Generator().manual_seed(seed))

    def every(up: Tensor, moments: Tensor, down: Tensor) -> list[Tensor]:
        return [
            scores.activation_norm(moments),
            scores.output_norm(moments, down),
            scores.magnitude(up, None, down),
            scores.magnitude(up, up.flip(1), down),
            scores.wanda_sp(moments, down),
            scores.flap_variance(moments, down),
            scores.minitron(moments),
        ]

    for straight, permuted in zip(every(up, moments, down), every(up[perm], moments[perm], down[:, perm]), strict=True):
        assert straight.dtype == torch.float64
        assert torch.allclose(straight[perm], permuted, rtol=1e-12)


@properties
@given(d_ff=st.integers(1, 12), seed=seeds)
def test_output_norm_is_the_error_of_removing_one_neuron(d_ff: int, seed: int) -> None:
    h, down = network(d_ff, 3, seed)
    expected = torch.stack([(h[:, j : j + 1] @ down[:, j : j + 1].T).norm() for j in range(d_ff)])
    assert torch.allclose(scores.output_norm(h.square().sum(0), down), expected)


def test_random_scores_follow_their_generator() -> None:
    first, second = (scores.random_scores(9, torch.Generator().manual_seed(seed)) for seed in (1, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, scores.random_scores(9, torch.Generator().manual_seed(2)))


def test_impossible_requests_are_refused() -> None:
    gram, down = torch.eye(4), torch.ones(2, 4)
    with pytest.raises(RecipeError, match="count=5"):
        selection.pivoted_qr_order(gram, 5)
    with pytest.raises(RecipeError, match="count=-1"):
        selection.forward_selection_order(gram, down, -1)
    with pytest.raises(RecipeError, match="keep=5"):
        selection.greedy_obs_order(gram, down, 5)
