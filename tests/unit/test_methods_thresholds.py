"""CATS and CHESS: what is left out, how much of it, and beside which heavy neurons."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ffsplit.calibrate.cache import Activations, TensorCache
from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import BudgetError, DataError
from ffsplit.ffn.selectors import Threshold, ThresholdSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.registry import get_method, method_config
from tests.unit.activation_layers import D_FF, D_MODEL, branches, error, fitted, layer, tokens_of, working

METHODS = ["cats", "chess"]


def importance(data: LayerData, *, use_down: bool) -> Tensor:
    """``a^2 E[u^2]``, times ``||down||^2``: brute force in float64."""
    ffn, x = data.ffn.map(torch.Tensor.double), tokens_of(data).double()
    squares = ffn.activations(x).square()
    if ffn.gated:
        squares = squares * linear(x, ffn.up, ffn.up_bias).square().mean(0)
    return squares * ffn.down.square().sum(0) if use_down else squares


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("heavy", [0.0, 0.3])
@pytest.mark.parametrize("sparsity", [0.2, 0.6])
@pytest.mark.parametrize("name", METHODS)
def test_the_share_left_out_is_the_one_asked_for(
    name: str, sparsity: float, heavy: float, gated: bool, biased: bool
) -> None:
    data = layer(gated=gated, biased=biased)
    module = fitted(data, name, sparsity=sparsity, heavy=heavy)
    out = int((~working(module, tokens_of(data))).sum())
    assert out / (data.inputs.tokens * D_FF) == pytest.approx(sparsity, abs=1e-3)


@pytest.mark.parametrize("use_down", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_chess_leaves_out_exactly_the_least_important(gated: bool, use_down: bool) -> None:
    data = layer(gated=gated)
    module = fitted(data, "chess", sparsity=0.5, use_down=use_down)
    cost, out = importance(data, use_down=use_down), ~working(module, tokens_of(data))
    least = cost.flatten().sort().values[: int(out.sum())].sum()
    torch.testing.assert_close(cost[out].sum(), least, rtol=1e-6, atol=0)


def test_cats_has_one_threshold_for_all() -> None:
    data = layer()
    module = fitted(data, "cats", sparsity=0.5)
    selector = branches(module)[0].selector
    assert isinstance(selector, Threshold)
    sizes = data.ffn.activations(tokens_of(data)).abs()
    assert float(selector.threshold) == pytest.approx(float(sizes.median()), rel=1e-3)
    assert torch.equal(working(module, tokens_of(data)), sizes > selector.threshold)
    assert module.spec.parameters == data.ffn.n_parameters + 1


def test_without_a_gate_or_down_chess_is_cats() -> None:
    data = layer(gated=False)
    chess, cats = fitted(data, "chess", sparsity=0.4, use_down=False), fitted(data, "cats", sparsity=0.4)
    x = tokens_of(data)
    assert torch.equal(chess(x), cats(x))
    assert chess.spec.parameters == cats.spec.parameters + D_FF - 1


def test_weighing_by_down_lowers_the_error() -> None:
    data = layer()
    cats, plain, ours = (
        error(data, fitted(data, name, sparsity=0.6, **settings))
        for name, settings in (("cats", {}), ("chess", {"use_down": False}), ("chess", {}))
    )
    assert ours < plain < cats


@pytest.mark.parametrize("name", METHODS)
def test_heavy_neurons_are_those_of_largest_output_norm_and_always_work(name: str) -> None:
    data = layer(biased=True)
    module = fitted(data, name, sparsity=0.5, heavy=0.25)
    always, rest = branches(module)
    norms = data.ffn.hidden(tokens_of(data)).norm(dim=0) * data.ffn.down.norm(dim=0)
    heavy = norms.topk(D_FF // 4).indices.sort().values
    assert always.selector is None
    assert torch.equal(always.up.dense().sort(0).values, data.ffn.up[heavy].sort(0).values)
    assert rest.spec.selector is not None
    assert rest.spec.selector.sparsity == pytest.approx(0.5 / 0.75)


def test_a_refit_lowers_the_error_at_the_same_work() -> None:
    data = layer()
    plain, refit = (fitted(data, "cats", sparsity=0.6, refit=flag, ridge=1e-6) for flag in (False, True))
    assert plain.spec == refit.spec
    assert error(data, refit) < 0.95 * error(data, plain)


@pytest.mark.parametrize("name", METHODS)
def test_more_sparsity_leaves_out_more(name: str) -> None:
    data = layer()
    x = tokens_of(data)
    some, more = (working(fitted(data, name, sparsity=s), x) for s in (0.3, 0.7))
    assert bool((some | ~more).all())
    assert more.sum() < some.sum()


@pytest.mark.parametrize("name", METHODS)
def test_too_many_heavy_neurons_are_refused_with_what_can_be_reached(name: str) -> None:
    config = method_config({"method": name, "sparsity": 0.8, "heavy": 0.25})
    with pytest.raises(BudgetError, match=r"largest reachable is 0\.7500"):
        get_method(name).plan(FFNShape(D_MODEL, D_FF, gated=True), config)
    reachable = method_config({"method": name, "sparsity": 0.75, "heavy": 0.25})
    assert get_method(name).plan(FFNShape(D_MODEL, D_FF, gated=True), reachable).branches[1].selector is not None


def test_zeros_of_a_relu_are_left_out_for_nothing() -> None:
    data = layer(gated=False, act=nn.ReLU())
    assert error(data, fitted(data, "cats", sparsity=0.3)) == 0
    assert error(data, fitted(data, "chess", sparsity=0.3)) == 0


def test_a_dead_neuron_stays_out() -> None:
    data = layer()
    data.ffn.up[5] = 0
    selector = branches(fitted(data, "chess", sparsity=0.2))[0].selector
    assert isinstance(selector, Threshold)
    assert torch.isinf(selector.threshold).nonzero().flatten().tolist() == [5]


def test_one_token_is_enough() -> None:
    data = layer(tokens=2)
    assert error(data, fitted(data, "chess", sparsity=0.5)) < 1


def test_activations_that_overflow_are_refused() -> None:
    inputs = Activations(TensorCache(), "x")
    inputs.append(torch.full((2, D_MODEL), float("inf")))
    data = LayerData(layer().ffn, inputs, "layers.3.mlp")
    with pytest.raises(DataError, match=r"layers\.3\.mlp"):
        fitted(data, "cats", sparsity=0.5)


def test_the_work_is_counted() -> None:
    one = D_MODEL * D_FF
    gated, plain = (FFNShape(D_MODEL, D_FF, gated=flag) for flag in (True, False))
    config = method_config({"method": "cats", "sparsity": 0.75})
    assert get_method("cats").plan(gated, config).macs == pytest.approx(one + 2 * 0.25 * one)
    assert get_method("cats").plan(plain, config).macs == pytest.approx(one + 0.25 * one)


def test_a_selector_survives_reloading_and_empty_batches() -> None:
    selector = Threshold(ThresholdSpec(neurons=3, sparsity=0.5), torch.tensor([0.5, 1.0, torch.inf]))
    empty = Threshold.empty(selector.spec, torch.float32, torch.device("cpu"))
    empty.load_state_dict(selector.state_dict())
    a = torch.tensor([[0.6, -1.0, 9.0], [-0.5, -1.1, 0.0]])
    assert empty.activations(a, a, nn.SiLU()).tolist() == [
        [pytest.approx(0.6), 0.0, 0.0],
        [0.0, pytest.approx(-1.1), 0.0],
    ]
    assert empty.activations(a[:0], a[:0], nn.SiLU()).shape == (0, 3)
