"""HiRE and hot-cold: who works is estimated from the inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ffsplit.calibrate.cache import Activations, TensorCache
from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import BudgetError
from ffsplit.ffn.selectors import Predictor, PredictorSpec, TopK, TopKSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.sum import SumFFN
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods.registry import get_method, method_config
from tests.unit.activation_layers import D_FF, D_MODEL, branches, error, fitted, layer, tokens_of, working


def outputs(data: LayerData) -> Tensor:
    return data.ffn.hidden(tokens_of(data)).abs() * data.ffn.down.norm(dim=0)


def top(sizes: Tensor, count: int) -> Tensor:
    return torch.zeros_like(sizes, dtype=torch.bool).scatter(1, sizes.topk(count).indices, True)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("heavy", [0.0, 0.25])
def test_hire_lets_a_fixed_number_of_neurons_work(heavy: float, biased: bool, gated: bool) -> None:
    data = layer(gated=gated, biased=biased)
    module = fitted(data, "hire", sparsity=0.6, heavy=heavy)
    assert (~working(module, tokens_of(data))).sum(1).unique().tolist() == [24]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("settings", [{"estimate": 1.0, "candidates": 1.0}, {"estimate": 0.01, "candidates": 9.0}])
def test_hire_is_the_exact_top_k_when_the_estimate_or_the_candidates_are_enough(
    settings: dict[str, float], biased: bool, gated: bool
) -> None:
    """A full estimate needs no spare candidates; with all neurons as candidates any estimate will do."""
    data = layer(gated=gated, biased=biased)
    found = working(fitted(data, "hire", sparsity=0.7, **settings), tokens_of(data))
    agree = (found == top(outputs(data), 12)).all(1).double().mean()
    assert float(agree) > 0.995  # neighbours in rank may be equal up to rounding


def recall(data: LayerData, module: SumFFN) -> float:
    wanted = top(outputs(data), 12)
    return float((working(module, tokens_of(data)) & wanted).sum() / wanted.sum())


def test_more_candidates_and_a_better_estimate_find_more() -> None:
    data = layer()
    by_candidates = [recall(data, fitted(data, "hire", sparsity=0.7, candidates=c)) for c in (1.0, 1.5, 2.0, 3.0)]
    by_rank = [recall(data, fitted(data, "hire", sparsity=0.7, estimate=e)) for e in (0.1, 0.5, 1.0)]
    assert by_candidates == sorted(by_candidates)
    assert by_rank == sorted(by_rank)
    assert 0.5 < by_candidates[0] < by_candidates[-1] <= 1


def test_the_estimate_of_hire_is_counted() -> None:
    shape = FFNShape(D_MODEL, D_FF, gated=True, gate_bias=True)
    config = method_config({"method": "hire", "sparsity": 0.5, "estimate": 0.25, "candidates": 1.2})
    spec = get_method("hire").plan(shape, config)
    selector = spec.branches[0].selector
    assert isinstance(selector, TopKSpec)
    assert (selector.rank, selector.candidates, selector.active) == (3, 24, 20)
    extra = 3 * (2 * D_FF + D_MODEL) + D_FF + 2 * D_FF
    assert spec.parameters == shape.parameters + extra
    assert spec.macs == pytest.approx(D_FF * D_MODEL * (2 * 24 / D_FF + 20 / D_FF) + extra)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("hot", [0.0, 0.25])
@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_hot_cold_leaves_out_the_share_asked_for(sparsity: float, hot: float, gated: bool) -> None:
    data = layer(gated=gated, biased=True)
    out = (~working(fitted(data, "hot-cold", sparsity=sparsity, hot=hot), tokens_of(data))).sum()
    assert float(out) / (data.inputs.tokens * D_FF) == pytest.approx(sparsity, abs=1e-3)


def test_hot_neurons_are_active_most_often_and_always_work() -> None:
    data = layer()
    always, cold = branches(fitted(data, "hot-cold", sparsity=0.5, hot=0.25))
    sizes = outputs(data)
    often = (sizes > sizes.mean(1, keepdim=True)).sum(0)
    hot = {int((data.ffn.up == row).all(1).nonzero()) for row in always.up.dense()}
    assert always.selector is None
    assert isinstance(cold.selector, Predictor)
    assert min(often[list(hot)]) >= max(often[[j for j in range(D_FF) if j not in hot]])


def test_a_predictor_beats_frequencies_alone() -> None:
    data = layer(act=nn.ReLU(), gated=False)
    module = fitted(data, "hot-cold", sparsity=0.5, hot=0.0, predictor=1.0)
    found = error(data, module)
    selector = branches(module)[0].selector
    assert isinstance(selector, Predictor)
    scores = selector.scores(tokens_of(data)).mean(0)
    selector.a.zero_()
    selector.bias.copy_(scores - scores.median())
    assert float((~working(module, tokens_of(data))).double().mean()) >= 0.5
    assert found < error(data, module)


def test_what_a_linear_map_tells_is_predicted_without_error() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(4).repeat(6)
    ffn = FFNWeights(torch.eye(4)[groups], torch.ones(4, 24), nn.ReLU(), up_bias=torch.full((24,), -0.3))
    inputs = Activations(TensorCache(), "x")
    inputs.append(torch.eye(4)[torch.arange(200) % 4][torch.randperm(200, generator=generator)])
    data = LayerData(ffn, inputs)
    assert error(data, fitted(data, "hot-cold", sparsity=0.7, hot=0.0, predictor=1.0, predictor_ridge=1e-9)) < 1e-6


def test_the_predictor_is_counted() -> None:
    shape = FFNShape(D_MODEL, D_FF, gated=True)
    config = method_config({"method": "hot-cold", "sparsity": 0.6, "hot": 0.25, "predictor": 0.25})
    spec = get_method("hot-cold").plan(shape, config)
    extra = 3 * (30 + D_MODEL) + 30
    assert spec.parameters == shape.parameters + extra
    assert spec.macs == pytest.approx(shape.weights * 0.4 + extra)


@pytest.mark.parametrize("name", ["hire", "hot-cold"])
def test_a_refit_lowers_the_error(name: str) -> None:
    data = layer()
    plain, refit = (error(data, fitted(data, name, sparsity=0.5, refit=flag, ridge=1e-6)) for flag in (False, True))
    assert refit < plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "hire", "sparsity": 0.99}, r"none of 40 neurons; the largest reachable is 0\.9750"),
        ({"method": "hot-cold", "sparsity": 0.9}, r"largest reachable is 0\.8000"),
    ],
)
def test_a_budget_out_of_reach_says_what_can_be_reached(settings: dict[str, object], message: str) -> None:
    config = method_config(settings)
    with pytest.raises(BudgetError, match=message):
        get_method(config.method).plan(FFNShape(D_MODEL, D_FF, gated=True), config)


def test_selectors_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="the branch has 5 of 4"):
        PredictorSpec(neurons=6, d_model=4, rank=1, sparsity=0.5).check(5, 4)
    top_k = TopKSpec(neurons=6, d_model=4, gated=True, biased=False, rank=1, candidates=7, active=2)
    with pytest.raises(ValueError, match="the branch has 6 of 5"):
        top_k.check(6, 5)
    with pytest.raises(ValueError, match="2 of 7 candidates of 6"):
        top_k.check(6, 4)


@pytest.mark.parametrize("name", ["hire", "hot-cold", "moefication", "cats", "chess", "teal", "wina"])
def test_reloading_empty_batches_and_one_token(name: str) -> None:
    data = layer(biased=True)
    module = fitted(data, name, sparsity=0.3, **({"expert_size": 4} if name == "moefication" else {}))
    other = SumFFN.empty(module.spec, data.ffn.act, torch.float32, "cpu")
    other.load_state_dict(module.state_dict())
    x = tokens_of(data)
    assert torch.equal(other(x), module(x))
    assert other(x[:0]).shape == (0, D_MODEL)
    assert other(x[0]).shape == (D_MODEL,)
    assert isinstance(other.branches[-1].selector, TopK) == (name == "hire")
