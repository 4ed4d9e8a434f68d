"""One threshold for all layers: the longest prefix of the ranked neurons that the budget pays for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffsplit.errors import RecipeError
from ffsplit.ops.compensate import pruned_mean
from ffsplit.ops.threshold import global_widths, standardised

layers = st.lists(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=9), min_size=1, max_size=4)


def tensors(scores: list[list[float]]) -> list[Tensor]:
    return [torch.tensor(layer, dtype=torch.float64) for layer in scores]


@given(scores=layers, costs=st.lists(st.integers(1, 5), min_size=4, max_size=4), data=st.data())
def test_the_widths_are_those_of_the_lowest_threshold_that_fits(
    scores: list[list[float]], costs: list[int], data: st.DataObject
) -> None:
    # Distinct scores: with ties a threshold does not say which of the equals stay.
    flat = [value for layer in scores for value in layer]
    scores = [[value + 1e-3 * (flat.index(value) + place) for place, value in enumerate(layer)] for layer in scores]
    costs = costs[: len(scores)]
    budget = data.draw(st.integers(sum(costs), sum(c * len(s) for c, s in zip(costs, scores, strict=True))))
    best = None
    for threshold in sorted({value for layer in scores for value in layer} | {10.0}):
        widths = [max(1, sum(value >= threshold for value in layer)) for layer in scores]
        if sum(c * w for c, w in zip(costs, widths, strict=True)) <= budget:
            best = widths
            break
    distinct = {value for layer in scores for value in layer}
    found = global_widths(tensors(scores), costs, budget)
    assert sum(c * w for c, w in zip(costs, found, strict=True)) <= budget
    if len(distinct) == sum(map(len, scores)):
        assert found == best


@given(scores=layers, align=st.integers(1, 5), data=st.data())
def test_widths_are_aligned_and_use_the_budget(scores: list[list[float]], align: int, data: st.DataObject) -> None:
    sizes = [len(layer) for layer in scores]
    least = sum(min(align, size) for size in sizes)
    budget = data.draw(st.integers(least, sum(sizes)))
    widths = global_widths(tensors(scores), [1] * len(scores), budget, align)
    assert all(width == size or (width % align == 0 and width) for width, size in zip(widths, sizes, strict=True))
    assert budget - align < sum(widths) <= budget
    if budget < sum(sizes):
        more = global_widths(tensors(scores), [1] * len(scores), budget + 1, align)
        assert all(new >= old for new, old in zip(more, widths, strict=True))


def test_a_layer_of_small_scores_keeps_its_best_neurons() -> None:
    assert global_widths([torch.arange(8.0), torch.full((8,), -9.0)], [1, 1], 9) == [8, 1]
    assert global_widths([torch.arange(8.0), torch.full((8,), -9.0)], [1, 1], 9, align=2) == [6, 2]


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(RecipeError, match="a budget of 5 parameters does not pay for 2 neurons of every layer"):
        global_widths([torch.arange(8.0), torch.arange(8.0)], [1, 2], 5, align=2)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), st.floats(0.1, 100), st.floats(-100, 100))
def test_standardised_scores_forget_scale_and_offset(values: list[float], scale: float, offset: float) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    found = standardised(scores)
    assert bool(torch.isfinite(found).all())
    if float(scores.std(correction=0)) > 1e-3:
        assert float(found.mean()) == pytest.approx(0, abs=1e-9)
        assert float(found.std(correction=0)) == pytest.approx(1)
        torch.testing.assert_close(standardised(scale * scores + offset), found, rtol=1e-6, atol=1e-6)


def test_equal_scores_are_all_average() -> None:
    assert torch.equal(standardised(torch.full((5,), 3.0)), torch.zeros(5, dtype=torch.float64))
    assert standardised(torch.ones(1)).tolist() == [0.0]


def test_the_mean_output_of_the_pruned_neurons() -> None:
    generator = torch.Generator().manual_seed(0)
    h, down = torch.randn(50, 6, generator=generator).double(), torch.randn(4, 6, generator=generator).double()
    pruned, kept = torch.tensor([1, 4]), torch.tensor([0, 2, 3, 5])
    bias = pruned_mean(h.mean(0), down, pruned)
    lost = h @ down.T - h[:, kept] @ down[:, kept].T
    torch.testing.assert_close(bias, lost.mean(0))
    error = (lost - bias).square().sum()
    for step in torch.eye(4, dtype=torch.float64):
        assert (lost - bias - 1e-3 * step).square().sum() > error
    assert torch.equal(pruned_mean(h.mean(0), down, pruned[:0]), torch.zeros(4, dtype=torch.float64))
