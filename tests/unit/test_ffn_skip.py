"""FFN-SkipLLM: where the stream has saturated, how much is skipped there, what is refused, and an exact cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import ffsplit
from ffsplit.budget.ffn_skip import FFNSkipConfig, check, ffn_skip, saturated_region
from ffsplit.budget.registry import entry_config
from ffsplit.errors import BudgetError, ModelError, RecipeError
from ffsplit.families import find_ffns
from ffsplit.families.forward import evaluating
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.skip_gate import SkipGateConfig
from tests.conformance.test_methods import ids, logits
from tests.conformance.test_planners import dense, scene_of
from tests.unit.test_dropping import streams

SHAPES = [FFNShape(d_model=8, d_ff=16, gated=True)] * 8


def config(**settings: Any) -> FFNSkipConfig:
    made = entry_config({"method": "ffn-skip", "sparsity": 0.25, **settings})
    assert isinstance(made, FFNSkipConfig)
    return made


def scaled(*scales: float) -> PreTrainedModel:
    """A model whose FFNs write so many times what they did into the stream."""
    model = dense("llama")
    with torch.no_grad():
        for scale, site in zip(scales, find_ffns(model).sites, strict=True):
            model.get_submodule(site.down).weight.mul_(scale)
    return model


@pytest.mark.parametrize(
    ("cosines", "settings", "region"),
    [
        ([1, 0.95, 0.96, 0.5, 0.91, 0.92, 0.93, 1], {}, range(4, 7)),
        ([1, 0.95, 0.96, 0.5, 0.91, 0.92, 0.93, 1], {"threshold": 0.5}, range(1, 7)),
        ([1, 1, 1, 0, 1, 1, 1, 1], {"protect_last": 2}, range(1, 3)),
        ([1, 1, 1, 0, 1, 1, 1, 1], {"protect_first": 0, "protect_last": 0}, range(4, 8)),
        ([0, 0, 0.9, 0, 0, 0, 0, 0], {"min_layers": 1}, range(2, 3)),
    ],
)
def test_the_region_is_the_longest_saturated_run_away_from_the_ends(
    cosines: list[float], settings: dict[str, Any], region: range
) -> None:
    assert saturated_region(cosines, config(**settings)) == region


@pytest.mark.parametrize("cosines", [[0.1] * 8, [1, 0, 1, 0, 1, 0, 1, 1], [1] * 7 + [0.89]])
def test_a_model_without_a_region_is_refused_with_what_was_measured(cosines: list[float]) -> None:
    settings = {"protect_first": 6} if sum(cosines) > 7 else {}
    with pytest.raises(ModelError, match=f"no saturated region.*0: {cosines[0]:.3f}, 1: .*7: {cosines[7]:.3f}"):
        saturated_region(cosines, config(**settings))


def test_a_real_decision_on_the_papers_cosine() -> None:
    """Layers 1 and 2 hardly write anything: they are the region, and divide the share of the whole model."""
    scene = scene_of(scaled(100, 1e-3, 1e-3, 1e4))
    with evaluating(scene.model):
        decision = ffn_skip(scene, config(threshold=0.99))
    gate = SkipGateConfig(sparsity=0.5)
    assert decision == [None, gate, gate, None]
    assert list(scene.notes["cosines"].values())[1:3] == pytest.approx([1, 1], abs=1e-3)
    names = [site.name for site in scene.found.sites]
    assert scene.notes["saturated"] == names[1:3]


def test_the_measured_cosine_is_that_of_the_stream_across_the_ffn() -> None:
    scene = scene_of(dense("llama"))
    with evaluating(scene.model):
        ffn_skip(scene, config(threshold=-1))
    wanted = [float(torch.cosine_similarity(r.double(), (r + f).double()).mean()) for _, r, f in streams()]
    assert list(scene.notes["cosines"].values()) == pytest.approx(wanted, rel=1e-4)


def test_compress_refuses_a_model_whose_ffns_all_turn_the_stream() -> None:
    model = scaled(100, 1e4, 1e6, 1e8)
    before = logits(model)
    with pytest.raises(ModelError, match=r"threshold=0\.9 or more.* 0: -?0\.\d+, 1: -?0\..*3: -?0\.\d+$"):
        ffsplit.compress(model, recipe="ffn-skip", sparsity=0.2, calibration=ids(), device="cpu")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sparsity": 0.75}, BudgetError, r"6 of 8 may be skipped; it must be below 0\.7500"),
        ({"min_layers": 7}, RecipeError, "leave 6 of the 8 FFNs to skip; min_layers=7"),
        ({"protect_first": 9}, RecipeError, "leave 0 of the 8 FFNs"),
        ({"sparsity": 0.74}, None, ""),
        ({"sparsity": 0}, None, ""),
    ],
)
def test_what_no_saturation_could_reach(settings: dict[str, Any], error: type[Exception] | None, message: str) -> None:
    if error is None:
        check(SHAPES, config(**settings))
        return
    with pytest.raises(error, match=message):
        check(SHAPES, config(**settings))


def test_a_region_too_short_for_the_budget_is_refused() -> None:
    scene = scene_of(scaled(100, 1e4, 1e-3, 1e4))
    with evaluating(scene.model), pytest.raises(BudgetError, match="1 of 4 may be skipped"):
        ffn_skip(scene, config(threshold=0.99, min_layers=1))


@pytest.mark.parametrize("settings", [{"sparsity": 1.0}, {"threshold": 1.0}, {"min_layers": 0}, {"target": "luck"}])
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(settings))):
        config(**settings)


def test_sparsity_0_leaves_everything_and_measures_nothing() -> None:
    result = ffsplit.compress(
        scaled(100, 1e4, 1e6, 1e8), recipe="ffn-skip", sparsity=0.0, calibration=ids(), device="cpu"
    )
    assert all(ffn.spec.skip is None for ffn in result.plan.ffns)
    torch.testing.assert_close(logits(result.model), logits(scaled(100, 1e4, 1e6, 1e8)))


@torch.no_grad()
def test_the_share_is_met_and_the_cache_holds_every_token() -> None:
    recipe = {"method": {"method": "ffn-skip", "sparsity": 0.3, "threshold": -1, "instead": "zero"}}
    result = ffsplit.compress(dense("llama"), recipe=recipe, calibration=ids(), device="cpu")
    sums = [module for module in result.model.modules() if isinstance(module, SumFFN)]
    skips = [module.skip for module in sums if module.skip is not None]
    assert len(sums) == len(skips) == 2
    seen: list[float] = []
    for skip in skips:
        skip.register_forward_pre_hook(lambda it, args: seen.append(float(1 - it.works(args[0]).float().mean())))
    logits(result.model)
    assert sum(seen) / 4 == pytest.approx(0.3, abs=0.01)
    prompt = ids(1, 7)
    out = result.model.generate(
        input_ids=prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, use_cache=True,
    )  # fmt: skip
    assert max(seen[2:]) == 1.0  # some single tokens really skipped
    whole = result.model(out.sequences[:, :-1], use_cache=True).past_key_values
    for stepwise, at_once in zip(out.past_key_values.layers, whole.layers, strict=True):
        assert stepwise.keys.shape[-2] == 7 + 11
        torch.testing.assert_close(stepwise.keys, at_once.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stepwise.values, at_once.values, rtol=1e-4, atol=1e-5)
