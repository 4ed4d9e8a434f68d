"""Pruning to a width, the mean of the pruned neurons as a bias, and the planners that choose widths."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import ffsplit
from ffsplit.errors import BudgetError, RecipeError
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.budgets import align_up
from ffsplit.methods.registry import get_method, method_config
from ffsplit.pipeline.recipe import load_recipe
from ffsplit.pipeline.result import CompressionResult
from tests.conformance.test_methods import ids, logits
from tests.tiny import tiny
from tests.unit.test_neurons import hidden, make_layer


def fit(data: Any, **settings: Any) -> SumFFN:
    config = method_config({"method": "prune", **settings})
    module = get_method("prune").apply(data, config).requires_grad_(False)
    assert module.spec == get_method("prune").plan(FFNShape.of(data.ffn), config)
    return module


def inputs(data: Any) -> Tensor:
    return torch.cat(list(data.inputs))


def run(family: str, **method: Any) -> CompressionResult:
    return ffsplit.compress(tiny(family), recipe={"method": method}, calibration=ids(), device="cpu")


def widths(result: CompressionResult) -> list[int]:
    return [ffn.spec.neurons for ffn in result.plan.ffns]


def test_a_width_is_met_exactly() -> None:
    data = make_layer()
    assert fit(data, width=7, score="output_norm", refit=False).spec.neurons == 7
    x = inputs(data)
    torch.testing.assert_close(fit(data, width=12, score="output_norm", refit=False)(x), data.ffn(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give exactly one of keep .* and width"),
        ({"keep": 0.5, "width": 4}, "give exactly one of keep .* and width"),
        ({"width": 0}, "width: .*greater than or equal to 1"),
        ({"width": 4, "align": 8}, "align=8 goes with keep; width=4"),
        ({"keep": 0.0}, "keep must be above 0 and at most 1"),
    ],
)
def test_one_budget(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        method_config({"method": "prune", **settings})


def test_more_neurons_than_there_are() -> None:
    config = method_config({"method": "prune", "width": 13})
    with pytest.raises(BudgetError, match="width=13 is more than the FFN's d_ff=12"):
        get_method("prune").plan(FFNShape(6, 12, gated=True), config)


def test_a_keep_from_the_caller_replaces_a_width() -> None:
    recipe = load_recipe({"method": {"method": "prune", "width": 40}}, keep=0.5)
    assert (recipe.method.model_dump()["keep"], recipe.method.model_dump()["width"]) == (0.5, None)


@pytest.mark.parametrize("gated", [True, False])
def test_the_bias_is_the_mean_of_what_was_pruned(gated: bool) -> None:
    data = make_layer(gated=gated)
    plain = fit(data, width=5, score="output_norm", refit=False)
    shifted = fit(data, width=5, score="output_norm", refit=False, compensate="mean")
    x = inputs(data)
    assert plain.bias is None
    assert shifted.bias is not None
    assert float((data.ffn(x) - plain(x)).mean(0).norm()) > 0.1
    torch.testing.assert_close((data.ffn(x) - shifted(x)).mean(0), torch.zeros(6), rtol=0, atol=1e-5)


def test_a_bias_fitted_with_down_is_the_affine_least_squares() -> None:
    data = make_layer(d_ff=8)
    module = fit(data, width=4, score="output_norm", compensate="mean", ridge=1e-9)
    x = inputs(data)
    columns = torch.cat([module.branches[0].hidden(x), torch.ones(len(x), 1)], dim=1).double()
    best = columns @ torch.linalg.lstsq(columns, data.ffn(x).double()).solution
    torch.testing.assert_close(module(x).double(), best, rtol=1e-3, atol=1e-3)
    without = fit(data, width=4, score="output_norm", ridge=1e-9)
    assert (data.ffn(x) - module(x)).norm() < (data.ffn(x) - without(x)).norm()


def test_a_bias_counts() -> None:
    shape = FFNShape(d_model=32, d_ff=64, gated=True)
    plan = get_method("prune").plan
    plain = plan(shape, method_config({"method": "prune", "keep": 0.5}))
    biased = plan(shape, method_config({"method": "prune", "keep": 0.5, "compensate": "mean"}))
    assert (plain.neurons, biased.neurons, biased.bias) == (32, 31, True)
    assert biased.parameters <= 0.5 * shape.parameters
    with pytest.raises(BudgetError, match=r"smallest reachable keep is 0\.0208"):
        plan(shape, method_config({"method": "prune", "keep": 0.02, "compensate": "mean"}))
    assert plan(shape, method_config({"method": "prune", "keep": 0.0209, "compensate": "mean"})).neurons == 1


def test_what_needs_no_text() -> None:
    free = {"method": "prune", "width": 4, "score": "magnitude", "refit": False}
    assert not method_config(free).needs_data
    assert method_config({**free, "compensate": "mean"}).needs_data


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_flap_cuts_at_one_threshold(family: str) -> None:
    """Brute force: the hidden variance of every neuron, measured on the dense model."""
    result = run(family, method="flap", keep=0.6)
    assert 0.58 < result.plan.keep <= 0.6
    model, scores = tiny(family), []
    sites = ffsplit.find_ffns(model).sites
    seen: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    for site in sites:
        model.get_submodule(site.down).register_forward_pre_hook(
            lambda _m, args, name=site.name: seen[name].append(args[0].flatten(0, -2).double())
        )
    batch = {"input_ids": ids()}
    if family == "t5":
        start = torch.zeros_like(ids()[:, :1])
        batch["decoder_input_ids"] = torch.cat([start, ids()[:, :-1]], dim=1)
    with torch.no_grad():
        model(**batch)
    for site in sites:
        down = model.get_submodule(site.down).weight.detach().double()
        energy = down.square().sum(1 if family == "gpt2" else 0)
        score = torch.cat(seen[site.name]).var(0, correction=0) * energy
        scores.append((score - score.mean()) / score.std(correction=0))
    kept = [score.sort(descending=True).values for score in scores]
    found = widths(result)
    assert len(set(found)) > 1
    lowest = min(float(score[width - 1]) for score, width in zip(kept, found, strict=True))
    highest_gone = max(float(score[width]) for score, width in zip(kept, found, strict=True))
    assert lowest > highest_gone


def test_flap_refuses_what_cannot_work() -> None:
    with pytest.raises(BudgetError, match=r"keep=0\.01 does not leave 1 neurons.*smallest reachable keep is 0\.0167"):
        run("llama", method="flap", keep=0.01)
    assert widths(run("llama", method="flap", keep=0.0167)) == [1, 1]
    with pytest.raises(RecipeError, match="score='greedy_obs' orders the neurons of one FFN"):
        run("llama", method="flap", keep=0.5, score="greedy_obs")
    with pytest.raises(RecipeError, match="method flap needs a budget: keep"):
        load_recipe("flap")


def test_flap_at_full_budget_changes_nothing() -> None:
    result = run("llama", method="flap", keep=1.0)
    torch.testing.assert_close(logits(result.model), logits(tiny("llama")))


def test_settings_reach_the_method() -> None:
    result = run("llama", method="flap", keep=0.6, score="magnitude", compensate="none", refit=True, ridge=0.5, align=8)
    for ffn in result.plan.ffns:
        assert ffn.method is not None
        assert ffn.method.model_dump(include={"score", "compensate", "refit", "ridge"}) == {
            "score": "magnitude", "compensate": "none", "refit": True, "ridge": 0.5
        }  # fmt: skip
        assert ffn.spec.neurons % 8 == 0
        assert not ffn.spec.bias


def test_a_tolerance_bounds_what_the_other_neurons_add(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ffsplit.budget.stat"):
        result = run("llama", method="stat", tol=0.3)
    assert "tol=0.3 keeps 73." in caplog.text
    assert all(1 < width < 80 for width in widths(result))
    assert result.report["budget"]["keep_ffn"] == pytest.approx(result.plan.keep)
    module = next(m for m in result.model.modules() if isinstance(m, SumFFN))
    dense = tiny("llama").model.layers[0].mlp
    seen: list[Tensor] = []
    dense_model = tiny("llama")
    dense_model.model.layers[0].mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        dense_model(input_ids=ids())
        every = dense.act_fn(dense.gate_proj(seen[0])) * dense.up_proj(seen[0])
        kept = module.branches[0].hidden(seen[0])
    left = every.double() - kept.double() @ torch.linalg.lstsq(kept.double(), every.double()).solution
    assert float(left.norm(dim=0).max()) <= 0.3 * float(every.double().norm(dim=0).max()) * (1 + 1e-6)


def test_a_coarser_tolerance_keeps_less_and_one_neuron_always_stays() -> None:
    found = [sum(widths(run("bert-mlm", method="stat", tol=tol))) for tol in (0.02, 0.1, 0.3, 0.99)]
    assert found == sorted(found, reverse=True)
    assert min(widths(run("gpt2", method="stat", tol=0.99))) == 1
    assert all(width % 16 == 0 for width in widths(run("bert-mlm", method="stat", tol=0.3, align=16)))


def test_a_tolerance_that_keeps_everything_changes_nothing() -> None:
    result = run("llama", method="stat", tol=0.01)
    assert result.plan.keep == 1
    torch.testing.assert_close(logits(result.model), logits(tiny("llama")))


def test_dead_ffns_keep_one_neuron() -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data.zero_()
    result = ffsplit.compress(model, recipe={"method": "stat"}, calibration=ids(), device="cpu")
    assert widths(result) == [1, 1]
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    flat = ffsplit.compress(model, recipe={"method": {"method": "flap", "keep": 0.5}}, calibration=ids(), device="cpu")
    assert flat.plan.keep <= 0.5


@pytest.mark.parametrize(("width", "align", "expected"), [(1, 1, 1), (1, 8, 8), (8, 8, 8), (9, 8, 16), (63, 8, 60)])
def test_align_up(width: int, align: int, expected: int) -> None:
    assert align_up(width, align, 60) == expected


def test_hidden_is_what_the_tests_think() -> None:
    data = make_layer()
    torch.testing.assert_close(data.moments.hidden_sum, hidden(data).sum(0), rtol=1e-5, atol=1e-5)
