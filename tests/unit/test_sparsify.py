"""The method sparsify: what it promises, what it refuses, and that each setting does what it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import BudgetError, RecipeError
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.sum import SumFFN
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods.registry import get_method, method_config
from ffsplit.ops.sparsity import n_m_mask, rows_mask, wanda
from ffsplit.pipeline.recipe import load_recipe

D_MODEL, D_FF = 16, 40
SCORES = ["magnitude", "wanda", "dass", "sparsegpt"]


def example(seed: int = 0, *, gated: bool = True, biased: bool = False, tokens: int = 400) -> LayerData:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    ffn = FFNWeights(
        normal(D_FF, D_MODEL),
        normal(D_MODEL, D_FF),
        nn.SiLU(),
        gate=normal(D_FF, D_MODEL) if gated else None,
        up_bias=normal(D_FF) if biased else None,
        gate_bias=normal(D_FF) if biased and gated else None,
        down_bias=normal(D_MODEL) if biased else None,
    )
    mix = torch.randn(D_MODEL, D_MODEL, generator=generator) * torch.logspace(0, -1, D_MODEL)
    x = torch.randn(tokens, D_MODEL, generator=generator) @ mix
    return LayerData(ffn, list(x.split(50)))


def fitted(data: LayerData, **settings: Any) -> SumFFN:
    config = method_config({"method": "sparsify", **settings})
    method = get_method("sparsify")
    made = method.apply(data, config)
    assert made.spec == method.plan(FFNShape.of(data.ffn), config)
    return made


@torch.no_grad()
def output_error(data: LayerData, made: SumFFN) -> float:
    x = torch.cat(list(data.inputs))
    dense = data.ffn(x)
    return float((made(x) - dense).norm() / dense.norm())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("heavy", [0.0, 0.2])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.77, 0.999])
def test_an_unstructured_budget_is_met_to_the_parameter(biased: bool, gated: bool, heavy: float, keep: float) -> None:
    data = example(gated=gated, biased=biased, tokens=50)
    shape = FFNShape.of(data.ffn)
    made = fitted(data, keep=keep, heavy=heavy, score="magnitude", refit=False)
    assert int(keep * shape.parameters) - 1 <= made.spec.parameters <= keep * shape.parameters
    assert sum(parameter.numel() for parameter in made.parameters()) == made.spec.parameters
    places = (D_FF - round(heavy * D_FF)) * D_MODEL * shape.matrices
    assert made.spec.stored_bits(16) == 16 * made.spec.parameters + places, "the mask is bits, and all of them"


def test_a_pattern_is_its_own_budget() -> None:
    data = example(tokens=50)
    share = fitted(data, pattern="2:4").spec.parameters / data.ffn.n_parameters
    assert share == 0.5
    assert fitted(data, pattern="2:4", keep=0.5).spec == fitted(data, pattern="2:4").spec
    assert fitted(data, pattern="1:4", keep=0.25).spec.parameters == data.ffn.n_parameters // 4
    heavy = fitted(data, pattern="4:8", heavy=0.2).spec
    assert heavy.parameters == data.ffn.n_parameters * 0.6
    assert [branch.neurons for branch in heavy.branches] == [8, 32]


def test_a_recipe_needs_a_budget_unless_the_pattern_is_one() -> None:
    assert load_recipe({"method": {"method": "sparsify", "pattern": "2:4"}}).method is not None
    with pytest.raises(RecipeError, match="keep is required when pattern is unstructured"):
        load_recipe("sparsify")
    with pytest.raises(RecipeError, match=r"pattern 2:4 fixes keep at 0\.5, not 0\.7"):
        load_recipe({"method": {"method": "sparsify", "pattern": "2:4"}}, keep=0.7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "keep is required when pattern is unstructured"),
        ({"keep": 0.0}, "keep"),
        ({"keep": 1.5}, "keep"),
        ({"pattern": "2:4", "keep": 0.6}, "fixes keep at 0.5, not 0.6: leave keep out"),
        ({"pattern": "2:4", "keep": 1.0}, "fixes keep at 0.5"),
        ({"pattern": "2:4", "keep": 0.5, "heavy": 0.2}, "and heavy=0.2 fixes keep at 0.6"),
        ({"pattern": "4:4"}, "'4:4' is neither"),
        ({"pattern": "2/4"}, "neither unstructured nor N:M"),
        ({"pattern": "0:4"}, "neither"),
        ({"pattern": "2:400"}, "neither"),
        ({"pattern": 124}, "in quotes"),
        ({"pattern": "2:4", "score": "dass"}, "use wanda"),
        ({"keep": 0.5, "heavy": 1.0}, "heavy"),
        ({"keep": 0.5, "sparsity": 0.5}, "unknown key 'sparsity'"),
    ],
    ids=str,
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        method_config({"method": "sparsify", **settings})


def test_a_budget_out_of_reach_says_what_is_in_reach() -> None:
    shape, method = FFNShape(D_MODEL, D_FF, gated=True, up_bias=True, down_bias=True), get_method("sparsify")

    def plan(**settings: Any) -> float:
        config = method_config({"method": "sparsify", **settings})
        return method.plan(shape, config).parameters / shape.parameters

    with pytest.raises(BudgetError, match="smallest reachable keep is") as refused:
        plan(keep=0.01)
    smallest = float(str(refused.value).split("smallest reachable keep is ")[1].rstrip("."))
    assert plan(keep=smallest + 1e-3) == pytest.approx(smallest, abs=2e-3)
    with pytest.raises(BudgetError, match="beside 20 dense heavy neurons"):
        plan(keep=0.4, heavy=0.5)
    with pytest.raises(BudgetError, match="without `keep`"):
        plan(keep=0.5, pattern="2:4")
    assert 0.5 < plan(pattern="2:4") < 0.52


def test_heavy_neurons_leave_the_hardware_its_tiles() -> None:
    config = method_config({"method": "sparsify", "pattern": "2:4", "heavy": 0.1})
    spec = get_method("sparsify").plan(FFNShape(576, 1536, gated=True), config)
    assert [branch.neurons for branch in spec.branches] == [128, 1408]


def test_published_wanda_is_a_mask_and_nothing_else() -> None:
    data = example()
    branch = fitted(data, pattern="2:4", score="wanda", refit=False).branches[0]
    for name, gram in (("up", data.moments.input_gram), ("down", data.statistics.hidden_gram)):
        weight = getattr(data.ffn, name)
        assert torch.equal(getattr(branch, name).dense(), weight * n_m_mask(wanda(weight, gram.diagonal()), 2, 4))


def test_magnitude_needs_no_data() -> None:
    data = replace(example(), inputs=[])
    branch = fitted(data, keep=0.5, score="magnitude", refit=False).branches[0]
    assert torch.equal(branch.up.dense(), data.ffn.up * rows_mask(data.ffn.up.abs(), D_FF * D_MODEL // 2))
    for settings in ({"refit": True}, {"score": "wanda"}, {"heavy": 0.1}):
        assert method_config(
            {"method": "sparsify", "keep": 0.5, "score": "magnitude", "refit": False, **settings}
        ).needs_data


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("gated", [False, True])
def test_the_refit_lowers_the_error(pattern: str, score: str, gated: bool) -> None:
    if score == "dass" and pattern != "unstructured":
        return
    data = example(3, gated=gated, biased=True)
    budget = {"keep": 0.5} if pattern == "unstructured" else {}
    plain, refitted = (
        output_error(data, fitted(data, pattern=pattern, score=score, refit=refit, **budget)) for refit in (False, True)
    )
    assert refitted < plain


def test_scores_rank_as_published() -> None:
    for seed in range(3):
        data = example(seed)
        errors = [
            output_error(data, fitted(data, pattern="2:4", score=score, refit=False))
            for score in ("magnitude", "wanda", "sparsegpt")
        ]
        assert errors == sorted(errors, reverse=True)


def test_dass_moves_weights_to_active_neurons() -> None:
    """A neuron that hardly ever is active keeps fewer of its weights, the more so the larger alpha."""
    data = example()
    quiet = data.ffn.gate.clone()
    quiet[:10] *= 0.01
    data = LayerData(replace(data.ffn, gate=quiet), data.inputs)
    shares = []
    for alpha in (0.0, 0.5, 1.0):
        up = fitted(data, keep=0.5, score="dass", alpha=alpha, refit=False).branches[0].up.dense()
        shares.append(float((up[:10] != 0).float().mean()))
    assert shares == sorted(shares, reverse=True)
    assert shares[2] < 0.8 * shares[0]


def test_heavy_neurons_stay_exact_and_the_rest_does_not() -> None:
    data = example()
    made = fitted(data, keep=0.6, heavy=0.25, refit=False)
    heavy = made.branches[0]
    norm = data.statistics.hidden_square_sum.sqrt() * data.ffn.down.double().norm(dim=0)
    order = norm.argsort(descending=True)[:10]
    assert torch.equal(heavy.up.dense(), data.ffn.up[order])
    assert torch.equal(heavy.down.dense(), data.ffn.down[:, order])
    assert made.branches[1].up.spec.kind == "masked"


@pytest.mark.parametrize("score", SCORES)
def test_dead_neurons_and_a_single_token(score: str) -> None:
    data = example(tokens=1)
    data.ffn.up[:5], data.ffn.down[:, 5:9] = 0, 0
    made = fitted(data, keep=0.5, score=score)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in made.parameters())


def test_inputs_that_are_all_zero() -> None:
    data = replace(example(), inputs=[torch.zeros(20, D_MODEL)])
    for settings in ({"keep": 0.5}, {"pattern": "2:4", "heavy": 0.2}):
        made = fitted(data, **settings)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in made.parameters())


def test_nearly_everything_kept_is_nearly_exact() -> None:
    data = example(biased=True)
    assert output_error(data, fitted(data, keep=0.99)) < 0.02
    errors = [output_error(data, fitted(data, keep=keep)) for keep in (0.3, 0.5, 0.7, 0.9)]
    assert errors == sorted(errors, reverse=True)
