"""Experts and their router."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ffsplit.calibrate.cache import Activations, TensorCache
from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import BudgetError
from ffsplit.ffn.selectors import Router, RouterSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods.registry import get_method, method_config
from tests.unit.activation_layers import D_FF, D_MODEL, branches, error, fitted, layer, tokens_of, working


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("heavy", [0.0, 0.2])
def test_the_share_left_out_is_the_one_asked_for(heavy: float, gated: bool) -> None:
    data = layer(gated=gated, biased=True)
    module = fitted(data, "moefication", sparsity=0.6, heavy=heavy, expert_size=4)
    out = (~working(module, tokens_of(data))).sum(1)
    assert out.unique().tolist() == [24]


def test_whole_experts_work_or_rest() -> None:
    data = layer()
    module = fitted(data, "moefication", sparsity=0.5, expert_size=4)
    experts = working(module, tokens_of(data)).reshape(-1, D_FF // 4, 4)
    assert torch.equal(experts.all(-1), experts.any(-1))
    assert experts.all(-1).sum(1).unique().tolist() == [5]


def test_the_sum_of_all_experts_is_the_dense_ffn() -> None:
    """Reordering the neurons loses none of them: a router that picks all experts changes nothing."""
    data = layer(biased=True)
    module = fitted(data, "moefication", sparsity=0.5, expert_size=4)
    module.branches[0].selector = None
    torch.testing.assert_close(module(tokens_of(data)), data.ffn(tokens_of(data)), rtol=1e-4, atol=1e-4)


def separable() -> LayerData:
    """Four groups of ReLU neurons; every token triggers one of them, which a linear map of the token tells."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(4).repeat(6)
    up = torch.eye(4)[groups] + 0.05 * torch.randn(24, 4, generator=generator)
    ffn = FFNWeights(up, torch.randn(4, 24, generator=generator), nn.ReLU(), up_bias=torch.full((24,), -0.3))
    inputs = Activations(TensorCache(), "x")
    inputs.append(torch.eye(4)[torch.randint(4, (200,), generator=generator)])
    return LayerData(ffn, inputs)


def test_experts_that_a_token_does_not_trigger_cost_nothing() -> None:
    data = separable()
    errors = [error(data, fitted(LayerData(data.ffn, data.inputs, seed=seed), "moefication", sparsity=0.75,
                                 expert_size=6)) for seed in range(8)]  # fmt: skip
    assert min(errors) < 1e-5


def test_the_fitted_router_beats_one_that_ignores_the_token() -> None:
    data = layer(act=nn.ReLU())
    module = fitted(data, "moefication", sparsity=0.5, expert_size=4)
    found = error(data, module)
    selector = branches(module)[0].selector
    assert isinstance(selector, Router)
    # Without its weight the bias that is left ranks by what the mean input gives.
    mean = tokens_of(data).mean(0)
    selector.bias += selector.weight @ mean
    selector.weight.zero_()
    assert found < error(data, module)


def test_a_refit_lowers_the_error() -> None:
    data = layer()
    plain, refit = (
        error(data, fitted(data, "moefication", sparsity=0.5, expert_size=4, refit=flag, ridge=1e-6))
        for flag in (False, True)
    )
    assert refit < 0.95 * plain


def test_experts_of_unequal_size() -> None:
    data = layer()
    module = fitted(data, "moefication", sparsity=0.5, expert_size=6)
    spec = branches(module)[0].spec.selector
    assert isinstance(spec, RouterSpec)
    assert (spec.experts, spec.active) == (6, 3)
    assert set(working(module, tokens_of(data)).sum(1).tolist()) <= {18 + n for n in range(4)} | {19, 20, 21}


def test_a_router_costs_and_is_counted() -> None:
    shape = FFNShape(D_MODEL, D_FF, gated=True)
    config = method_config({"method": "moefication", "sparsity": 0.75, "expert_size": 10})
    spec = get_method("moefication").plan(shape, config)
    assert spec.parameters == shape.parameters + 4 * (D_MODEL + 1)
    assert spec.macs == pytest.approx(shape.weights / 4 + 4 * (D_MODEL + 1))


def test_too_few_experts_are_refused_with_what_can_be_reached() -> None:
    config = method_config({"method": "moefication", "sparsity": 0.8, "expert_size": 10})
    with pytest.raises(BudgetError, match=r"none of 4 experts; the largest reachable is 0\.7500"):
        get_method("moefication").plan(FFNShape(D_MODEL, D_FF, gated=True), config)


def test_a_router_of_another_size_is_refused() -> None:
    spec = RouterSpec(neurons=6, d_model=4, experts=3, active=1)
    with pytest.raises(ValueError, match="the branch has 5 of 4"):
        spec.check(5, 4)
    with pytest.raises(ValueError, match="cannot be"):
        RouterSpec(neurons=6, d_model=4, experts=7, active=1).check(6, 4)


def test_a_router_takes_empty_batches_and_reloads() -> None:
    spec = RouterSpec(neurons=5, d_model=2, experts=2, active=1)
    router = Router(spec, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.0, 0.5]))
    other = Router.empty(spec, torch.float32, torch.device("cpu"))
    other.load_state_dict(router.state_dict())
    x = torch.tensor([[1.0, 0.4], [1.0, 0.6]])
    assert other.activations(torch.ones(2, 5), x, nn.ReLU()).tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    assert other.activations(torch.ones(0, 5), x[:0], nn.ReLU()).shape == (0, 5)
