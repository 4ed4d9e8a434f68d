"""TEAL and WINA: inputs that are left out of every projection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from ffsplit.errors import BudgetError
from ffsplit.ffn.selectors import InputThreshold, TopInputs, TopInputsSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.registry import get_method, method_config
from ffsplit.methods.sparsity import late_tokens
from tests.unit.activation_layers import D_FF, D_MODEL, branches, error, fitted, layer, tokens_of


def shares(module: SumFFN, x: Tensor) -> list[float]:
    """Which share of the inputs of `up`, `down` and `gate` is zero."""
    branch = branches(module)[0]
    assert branch.selector is not None
    masked = [branch.selector.inputs(x, "up"), branch.selector.hidden(branch.hidden(x))]
    if branch.gate is not None:
        masked.append(branch.selector.inputs(x, "gate"))
    return [float((values == 0).double().mean()) for values in masked]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("sparsity", [0.25, 0.6, 0.9])
@pytest.mark.parametrize("allocation", ["greedy", "uniform"])
def test_teal_leaves_out_the_average_asked_for(allocation: str, sparsity: float, gated: bool) -> None:
    data = layer(gated=gated, biased=True)
    module = fitted(data, "teal", sparsity=sparsity, allocation=allocation)
    found = shares(module, tokens_of(data))
    assert sum(found) / len(found) == pytest.approx(sparsity, abs=1e-3)
    if allocation == "uniform":
        assert found == pytest.approx([sparsity] * len(found), abs=1e-3)


@pytest.mark.parametrize("gated", [True, False])
def test_teal_computes_what_its_thresholds_say(gated: bool) -> None:
    data = layer(gated=gated)
    module = fitted(data, "teal", sparsity=0.5)
    selector = branches(module)[0].selector
    assert isinstance(selector, InputThreshold)
    up, down, *gate = selector.threshold.tolist()
    ffn, x = data.ffn, tokens_of(data)

    def thin(values: Tensor, threshold: float) -> Tensor:
        return values * (values.abs() > threshold)

    h = linear(thin(x, up), ffn.up)
    h = ffn.act(h) if ffn.gate is None else ffn.act(linear(thin(x, gate[0]), ffn.gate)) * h
    torch.testing.assert_close(module(x), linear(thin(h, down), ffn.down))


def test_the_greedy_allocation_beats_equal_shares() -> None:
    data = layer()
    greedy, uniform = (error(data, fitted(data, "teal", sparsity=0.5, allocation=a)) for a in ("greedy", "uniform"))
    assert greedy < uniform


@pytest.mark.parametrize(("name", "settings"), [("teal", {}), ("wina", {})])
def test_more_sparsity_makes_more_error(name: str, settings: dict[str, Any]) -> None:
    data = layer()
    errors = [error(data, fitted(data, name, sparsity=s, **settings)) for s in (0.1, 0.3, 0.5, 0.7)]
    assert errors == sorted(errors)


def test_a_refit_lowers_the_error() -> None:
    data = layer()
    plain, refit = (error(data, fitted(data, "teal", sparsity=0.5, refit=flag, ridge=1e-6)) for flag in (False, True))
    assert refit < 0.95 * plain


@pytest.mark.parametrize("gated", [True, False])
def test_wina_keeps_the_inputs_of_largest_weighted_size(gated: bool) -> None:
    data = layer(gated=gated)
    module, x = fitted(data, "wina", sparsity=0.5), tokens_of(data)[:50]
    selector = branches(module)[0].selector
    assert isinstance(selector, TopInputs)
    ffn = data.ffn
    for values, masked, weight in [
        (x, selector.inputs(x, "up"), ffn.up),
        (x, selector.inputs(x, "gate"), ffn.gate) if ffn.gate is not None else (x, selector.inputs(x, "up"), ffn.up),
        (ffn.hidden(x), selector.hidden(ffn.hidden(x)), ffn.down),
    ]:
        score = values.abs() * weight.norm(dim=0)
        kept = score >= score.sort(descending=True).values[:, values.shape[1] // 2 - 1 : values.shape[1] // 2]
        assert torch.equal(masked, values * kept)


def test_wina_needs_no_data_and_counts_exactly() -> None:
    shape = FFNShape(D_MODEL, D_FF, gated=True)
    config = method_config({"method": "wina", "sparsity": 0.7})
    assert not config.needs_data
    selector = get_method("wina").plan(shape, config).branches[0].selector
    assert isinstance(selector, TopInputsSpec)
    assert (selector.inputs, selector.hidden) == (3, 12)  # 0.3 * 12 = 3.6, of which at most 3
    products = D_FF * D_MODEL * (2 * 3 / D_MODEL + 12 / D_FF)
    assert selector.macs(*[D_FF * D_MODEL] * 3) == pytest.approx(products + selector.parameters)


def test_wina_refuses_to_leave_nothing() -> None:
    config = method_config({"method": "wina", "sparsity": 0.95})
    with pytest.raises(BudgetError, match=r"none of 12 inputs; the largest reachable is 0\.9167"):
        get_method("wina").plan(FFNShape(D_MODEL, D_FF, gated=True), config)


def test_zeros_are_left_out_and_equals_are_counted() -> None:
    spec = TopInputsSpec(neurons=3, d_model=4, gated=False, inputs=2, hidden=1)
    selector = TopInputs(spec, torch.ones(4), torch.tensor([1.0, 1.0, 5.0]))
    assert int((selector.inputs(torch.ones(2, 4), "up") != 0).sum()) == 4
    assert selector.hidden(torch.tensor([[3.0, -4.0, 1.0]])).tolist() == [[0.0, 0.0, 1.0]]
    assert selector.inputs(torch.ones(0, 4), "up").shape == (0, 4)


def test_a_selector_of_another_size_is_refused() -> None:
    spec = TopInputsSpec(neurons=3, d_model=4, gated=False, inputs=2, hidden=1)
    with pytest.raises(ValueError, match="the branch has 5 of 4"):
        spec.check(5, 4)
    with pytest.raises(ValueError, match="cannot work"):
        TopInputsSpec(neurons=3, d_model=4, gated=False, inputs=5, hidden=1).check(3, 4)


def test_late_tokens_are_few_and_from_the_end_of_every_sequence() -> None:
    data = layer(tokens=400)
    found = late_tokens(data, 20)
    ends = torch.cat([x[3 * len(x) // 4 :] for x in data.inputs])
    assert 12 <= len(found) <= 20
    assert all(bool((ends == row).all(dim=1).any()) for row in found)
    assert len(late_tokens(data, 10_000)) == len(ends)
