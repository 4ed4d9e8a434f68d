"""Scores, masks, SparseGPT and the refit of the survivors, against brute force and their definitions."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffsplit.errors import RecipeError
from ffsplit.ops.linalg import ridged, shifted_cholesky
from ffsplit.ops.sparsegpt import sparsegpt, sparsegpt_n_m
from ffsplit.ops.sparsity import best_mask, dass, n_m_mask, rows_mask, wanda
from ffsplit.ops.support import refit_support
from tests.property.amount import examples

properties = examples(40)
ROWS, COLUMNS, SEEDS = st.integers(1, 6), st.integers(1, 30), st.integers(0, 2**20)
PATTERNS = st.sampled_from([(1, 2), (2, 4), (4, 8), (3, 5), (1, 3)])


def layer(rows: int, columns: int, seed: int, tokens: int = 100) -> tuple[Tensor, Tensor]:
    """A weight and the Gram of correlated inputs of unequal energy."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, columns)
    return weight, x.T @ x


def error(weight: Tensor, sparse: Tensor, gram: Tensor) -> float:
    change = sparse.double() - weight
    return float((change @ gram * change).sum())


def random_mask(rows: int, columns: int, seed: int) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed + 1)) < 0.5


def test_wanda_is_the_size_of_a_weights_contribution() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(3, 5, generator=generator), torch.randn(20, 5, generator=generator)
    score = wanda(weight, x.square().sum(0))
    for i, j in itertools.product(range(3), range(5)):
        assert float(score[i, j]) == pytest.approx(float((x[:, j] * weight[i, j]).norm()), rel=1e-5)


def test_dass_weighs_neurons_and_alpha_zero_is_wanda() -> None:
    weight, energy, norms = torch.randn(3, 5), torch.rand(5), torch.tensor([1.0, 4.0, 0.0])
    plain = wanda(weight, energy)
    assert torch.equal(dass(weight, energy, norms, 0.0), plain)
    torch.testing.assert_close(dass(weight, energy, norms, 0.5), plain * torch.tensor([[1.0], [2.0], [0.0]]).double())


def test_an_outputs_factor_cannot_change_what_is_kept_within_it() -> None:
    """Why DaSS is compared over the whole matrix and refused with N:M."""
    weight, energy, norms = torch.randn(6, 16), torch.rand(16), torch.rand(6) + 0.1
    weighted, plain = dass(weight, energy, norms, 1.0), wanda(weight, energy)
    assert torch.equal(n_m_mask(weighted, 2, 4), n_m_mask(plain, 2, 4))
    assert not torch.equal(best_mask(weighted, 48), best_mask(plain, 48))


@properties
@given(rows=ROWS, columns=COLUMNS, seed=SEEDS, data=st.data())
def test_rows_keep_their_best_and_equally_many(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    score = layer(rows, columns, seed)[0].abs()
    kept = data.draw(st.integers(0, rows * columns))
    mask = rows_mask(score, kept)
    counts = mask.sum(1)
    assert int(mask.sum()) == kept
    assert int(counts.max() - counts.min()) <= 1
    for row in range(rows):
        expected = score[row].sort(descending=True).values[: counts[row]]
        assert torch.equal(score[row][mask[row]].sort(descending=True).values, expected)
    # No row gave up a weight for a worse one that another row keeps as its extra.
    each = kept // rows
    following = score.sort(dim=1, descending=True).values
    if kept % rows:
        extra = counts > each
        assert float(following[extra, each].min()) >= float(following[~extra, each].max())


@properties
@given(rows=ROWS, columns=COLUMNS, seed=SEEDS, data=st.data())
def test_the_best_mask_has_the_greatest_total(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    score = layer(rows, columns, seed)[0].abs()
    kept = data.draw(st.integers(0, rows * columns))
    mask = best_mask(score, kept)
    assert int(mask.sum()) == kept
    assert float(score[mask].sum()) == pytest.approx(float(score.flatten().topk(kept).values.sum()))


@properties
@given(rows=ROWS, columns=COLUMNS, seed=SEEDS, pattern=PATTERNS)
def test_n_of_every_m_are_the_best_of_their_group(rows: int, columns: int, seed: int, pattern: tuple[int, int]) -> None:
    n, m = pattern
    score = layer(rows, columns, seed)[0].abs()
    mask = n_m_mask(score, n, m)
    assert mask.shape == score.shape
    for start in range(0, columns, m):
        group, kept = score[:, start : start + m], mask[:, start : start + m]
        best = group.topk(min(n, group.shape[1]), dim=1).values.sum(1)
        torch.testing.assert_close((group * kept).sum(1), best)
        assert bool((kept.sum(1) == min(n, group.shape[1])).all())


def test_worthless_weights_are_still_counted() -> None:
    """Zero scores (dead inputs) tie; a pattern and a number are promises all the same."""
    assert int(rows_mask(torch.zeros(3, 7), 10).sum()) == 10
    assert n_m_mask(torch.zeros(2, 6), 2, 4).sum(1).tolist() == [4, 4]
    assert rows_mask(torch.zeros(0, 5), 0).shape == (0, 5)


@pytest.mark.parametrize("kept", [-1, 13])
def test_a_number_out_of_range_is_refused(kept: int) -> None:
    with pytest.raises(RecipeError, match=r"0\.\.12"):
        rows_mask(torch.ones(3, 4), kept)
    with pytest.raises(RecipeError, match="n=5"):
        n_m_mask(torch.ones(3, 4), 5, 4)


def obs_reference(weight: Tensor, gram: Tensor, mask: Tensor, damp: float) -> Tensor:
    """Optimal brain surgeon, column by column with explicit inverses: the weights to the left are decided."""
    result, metric = weight.clone(), ridged(gram, damp)
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(metric[column:, column:])
        gone = ~mask[:, column]
        step = result[gone, column] / inverse[0, 0]
        result[gone, column:] -= step[:, None] * inverse[0]
    return result * mask


@properties
@given(rows=ROWS, columns=COLUMNS, seed=SEEDS, block=st.integers(1, 40), pattern=st.none() | PATTERNS)
def test_sparsegpt_updates_as_optimal_brain_surgeon(
    rows: int, columns: int, seed: int, block: int, pattern: tuple[int, int] | None
) -> None:
    weight, gram = layer(rows, columns, seed)
    if pattern is None:
        values, mask = sparsegpt(weight, gram, rows * columns // 2, damp=0.01, block=block)
        assert int(mask.sum()) == rows * columns // 2
    else:
        values, mask = sparsegpt_n_m(weight, gram, *pattern, damp=0.01, block=block)
        again, same = sparsegpt_n_m(weight, gram, *pattern, damp=0.01)
        assert torch.equal(mask, same)
        torch.testing.assert_close(values, again)
    torch.testing.assert_close(values, obs_reference(weight, gram, mask, 0.01), rtol=1e-7, atol=1e-9)


@properties
@given(rows=ROWS, columns=st.integers(8, 30), seed=SEEDS)
def test_sparsegpt_chooses_by_saliency_in_its_first_block(rows: int, columns: int, seed: int) -> None:
    weight, gram = layer(rows, columns, seed)
    _, mask = sparsegpt(weight, gram, rows * columns // 2, damp=0.01, block=columns)
    metric = ridged(gram, 0.01)
    pivots = torch.stack([torch.linalg.inv(metric[j:, j:])[0, 0] for j in range(columns)])
    saliency = weight.square() / pivots
    assert float(saliency[mask].min()) >= float(saliency[~mask].max()) * (1 - 1e-9)


@properties
@given(rows=ROWS, columns=COLUMNS, seed=SEEDS)
def test_an_identity_gram_makes_every_score_the_magnitude(rows: int, columns: int, seed: int) -> None:
    weight, _ = layer(rows, columns, seed)
    eye, kept = torch.eye(columns), rows * columns // 2
    values, mask = sparsegpt(weight, eye, kept, block=columns)
    assert torch.equal(mask, best_mask(weight.abs(), kept))
    assert torch.equal(values, weight * mask)
    assert torch.equal(sparsegpt_n_m(weight, eye, 2, 4)[0], weight * n_m_mask(weight.abs(), 2, 4))
    assert torch.equal(rows_mask(wanda(weight, eye.diagonal()), kept), rows_mask(weight.abs(), kept))
    torch.testing.assert_close(refit_support(weight, mask, eye, 0.0), weight * mask)


@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8)])
def test_better_algorithms_leave_less_error(pattern: tuple[int, int] | None) -> None:
    for seed in range(3):
        weight, gram = layer(32, 64, seed, tokens=300)
        kept = 32 * 32

        def masked(score: Tensor, kept: int = kept) -> Tensor:
            return rows_mask(score, kept) if pattern is None else n_m_mask(score, *pattern)

        plain = error(weight, weight * masked(weight.abs()), gram)
        by_wanda = error(weight, weight * masked(wanda(weight, gram.diagonal())), gram)
        found = sparsegpt(weight, gram, kept) if pattern is None else sparsegpt_n_m(weight, gram, *pattern)
        swept = error(weight, found[0], gram)
        refitted = error(weight, refit_support(weight, found[1], gram, 1e-6), gram)
        assert refitted < swept < by_wanda < plain


@properties
@given(rows=ROWS, columns=COLUMNS, seed=SEEDS, tokens=st.integers(0, 60), ridge=st.sampled_from([0.0, 1e-3, 0.1]))
def test_the_refit_never_raises_the_error(rows: int, columns: int, seed: int, tokens: int, ridge: float) -> None:
    """Few tokens, dead inputs and rows without a survivor included; in the norm that the ridge makes."""
    weight, gram = layer(rows, columns, seed, tokens)
    gram[0], gram[:, 0] = 0.0, 0.0
    mask = random_mask(rows, columns, seed)
    found = refit_support(weight, mask, gram, ridge)
    assert bool(torch.isfinite(found).all())
    assert bool((found[~mask] == 0).all())
    metric = ridged(gram, max(ridge, 1e-8))
    slack = 1e-9 * error(weight, torch.zeros_like(weight), metric)
    assert error(weight, found, metric) <= error(weight, weight * mask, metric) + slack
    # A dead input's weights have nothing to be fitted to.
    torch.testing.assert_close(found[:, 0], (weight * mask)[:, 0], rtol=1e-6, atol=1e-6)


@properties
@given(rows=ROWS, columns=COLUMNS, seed=SEEDS, ridge=st.sampled_from([1e-6, 1e-3]))
def test_the_refit_solves_each_rows_least_squares(rows: int, columns: int, seed: int, ridge: float) -> None:
    weight, gram = layer(rows, columns, seed)
    mask = random_mask(rows, columns, seed)
    found, metric = refit_support(weight, mask, gram, ridge), ridged(gram, ridge)
    for row in range(rows):
        support = mask[row].nonzero().flatten()
        inside = metric[support][:, support]
        expected = torch.linalg.solve(inside, metric[support] @ weight[row])
        torch.testing.assert_close(found[row, support], expected, rtol=1e-6, atol=1e-8)


def test_batches_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = layer(9, 20, 3)
    mask = random_mask(9, 20, 3)
    whole = refit_support(weight, mask, gram, 1e-3)
    monkeypatch.setattr("ffsplit.ops.support.ELEMENTS", 250)
    torch.testing.assert_close(refit_support(weight, mask, gram, 1e-3), whole)


def test_a_full_mask_keeps_the_weight() -> None:
    weight, gram = layer(4, 10, 0)
    assert torch.equal(refit_support(weight, torch.ones(4, 10, dtype=torch.bool), gram, 0.0), weight)
    values, mask = sparsegpt(weight, gram, 40)
    assert bool(mask.all())
    assert torch.equal(values, weight)


@properties
@given(rows=ROWS, columns=COLUMNS, seed=SEEDS, tokens=st.integers(0, 3), damp=st.sampled_from([0.0, 0.01]))
def test_singular_grams_give_finite_weights(rows: int, columns: int, seed: int, tokens: int, damp: float) -> None:
    weight, gram = layer(rows, columns, seed, tokens)
    gram[0], gram[:, 0] = 0.0, 0.0
    for values, _ in (
        sparsegpt(weight.float(), gram, rows * columns // 2, damp=damp),
        sparsegpt_n_m(weight.float(), gram, 2, 4, damp=damp),
    ):
        assert bool(torch.isfinite(values).all())


def test_the_shift_makes_an_indefinite_matrix_definite() -> None:
    matrix = torch.diag(torch.tensor([2.0, 1.0, -0.5], dtype=torch.float64))
    factor = shifted_cholesky(matrix)
    difference = factor @ factor.T - matrix
    torch.testing.assert_close(difference, difference[0, 0] * torch.eye(3, dtype=torch.float64))
    assert float(difference[0, 0]) > 0.5
    definite = torch.eye(3, dtype=torch.float64)
    assert torch.equal(shifted_cholesky(definite), definite)
