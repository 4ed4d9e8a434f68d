"""Every registered planner, one protocol: a planner that is added is tested here as soon as it has cases."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import ffsplit
from ffsplit.budget import registry
from ffsplit.budget.registry import Decision, PlannerConfig, entry_config, planners
from ffsplit.budget.scene import Scene
from ffsplit.calibrate.batches import make_batches
from ffsplit.calibrate.gradients import collect_gradients
from ffsplit.families import DroppedAttention, find_attention, find_ffns
from ffsplit.families.forward import evaluating
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.registry import get_method
from ffsplit.pipeline.compress import shapes_of
from ffsplit.pipeline.plan import make_plan
from tests.conformance.examples import Examples
from tests.conformance.test_methods import assert_same, ids, label, logits
from tests.tiny import tiny

FAMILIES = ("llama", "bert-mlm")
LAYERS = 4

FILES: dict[str, Any] = {
    file.stem: yaml.safe_load(file.read_text(encoding="utf-8"))
    for file in sorted((Path(__file__).parent / "planner_cases").glob("*.yaml"))
}
"""One file a planner: a list of cases, or a mapping with ``cases`` and ``families``."""
CASES: dict[str, list[dict[str, Any]]] = {
    name: content["cases"] if isinstance(content, dict) else content for name, content in FILES.items()
}
"""The first case runs on every family, all of them on the first."""
NARROW: dict[str, tuple[str, ...]] = {
    name: tuple(content["families"]) for name, content in FILES.items() if isinstance(content, dict)
}
"""The families of planners that the usual ones give nothing to work on. Those without Llama must refuse it."""


def families(name: str) -> tuple[str, ...]:
    return NARROW.get(name, FAMILIES)


FIRST = [(families(name)[0], name, cases[0]) for name, cases in CASES.items()]
EACH = [(family, name, cases[0]) for name, cases in CASES.items() for family in families(name)]
EVERY = [(families(name)[0], name, case) for name, cases in CASES.items() for case in cases] + [
    (family, name, cases[0]) for name, cases in CASES.items() for family in families(name)[1:]
]


def dense(family: str) -> PreTrainedModel:
    """A tiny model with more layers than the others, whose FFNs matter by differing amounts."""
    config = tiny(family).config
    config.num_hidden_layers = LAYERS
    torch.manual_seed(0)
    model = type(tiny(family))(config).eval()
    with torch.no_grad():
        for number, site in enumerate(find_ffns(model).sites):
            model.get_submodule(site.down).weight.mul_((9.0, 3.0, 1.0, 6.0)[number])
        # Initialised biases are zero, and zero biases hide that one is lost.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def decided(family: str, name: str, case: dict[str, Any], **options: Any) -> ffsplit.CompressionResult:
    return ffsplit.compress(
        dense(family), recipe={"method": {"method": name, **case}}, calibration=ids(), device="cpu", **options
    )


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    return Examples(decided, tmp_path_factory)


def scene_of(model: PreTrainedModel, store: Path | None = None, *, attention: bool = False) -> Scene:
    found = find_ffns(model)
    data = make_batches(model, None, ids(), seq_len=32, samples=6, batch_size=1)
    sites = find_attention(model, found).sites if attention else ()
    return Scene(model, found, shapes_of(model, found), data, torch.device("cpu"), store=store, attention=sites)


def state(model: PreTrainedModel) -> list[object]:
    """Modules, attributes, hooks and training flags."""
    return [
        (name, type(module), sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ] + [(name, parameter.requires_grad, parameter.grad is None) for name, parameter in model.named_parameters()]


def decision_on(model: PreTrainedModel, name: str, case: dict[str, Any], store: Path | None = None) -> Decision:
    return decision_and_scene(model, name, case, store)[0]


def decision_and_scene(
    model: PreTrainedModel, name: str, case: dict[str, Any], store: Path | None = None
) -> tuple[Decision, Scene]:
    config = entry_config({"method": name, **case})
    assert isinstance(config, PlannerConfig)
    with evaluating(model):
        scene = scene_of(model, store, attention=config.looks_at_attention)
        if config.needs_gradients:
            taken = collect_gradients(model, scene.found.sites, scene.batches(), scene.device)
            scene = replace(scene, gradients=taken)
        return planners()[name].decide(scene, config), scene


def test_every_planner_has_cases() -> None:
    assert set(CASES) == set(planners())


@pytest.mark.parametrize("name", [name for name in NARROW if "llama" not in NARROW[name]])
def test_a_planner_for_other_families_says_so_before_any_text_is_read(name: str) -> None:
    recipe = {"method": {"method": name, **CASES[name][0]}}
    with pytest.raises(ffsplit.ModelError, match="FFNs of this model"):
        ffsplit.compress(dense("llama"), recipe=recipe, calibration="no such file", device="cpu")


@pytest.mark.parametrize(("family", "name", "case"), EVERY, ids=label)
def test_the_budget_is_met_over_the_whole_model(
    family: str, name: str, case: dict[str, Any], examples: Examples
) -> None:
    result = examples.result(family, name, case)
    plan = result.plan
    assert len(plan.ffns) == LAYERS
    assert plan.attention or any(ffn.method is not None for ffn in plan.ffns)
    assert not plan.attention or case.get("target") in ("attention", "joint") or name == "ffn-fusion"
    for gone in plan.attention:
        assert isinstance(result.model.get_submodule(gone.site.name), DroppedAttention)
    for budget in ("keep", "bits"):
        assert budget not in case or getattr(plan, budget) <= case[budget]
    modules = [result.model.get_submodule(ffn.name) for ffn in plan.ffns]
    for planned, module in zip(plan.ffns, modules, strict=True):
        assert isinstance(module, SumFFN) == (planned.method is not None)
        if isinstance(module, SumFFN):
            assert module.spec == planned.spec
    assert bool(torch.isfinite(logits(result.model)).all())


@pytest.mark.parametrize(("family", "name", "case"), EVERY, ids=label)
def test_deciding_leaves_the_model_as_it_was(family: str, name: str, case: dict[str, Any]) -> None:
    model = dense(family)
    before, weights = state(model), {n: t.clone() for n, t in model.state_dict().items()}
    first = decision_on(model, name, case)
    assert state(model) == before
    assert all(torch.equal(tensor, weights[n]) for n, tensor in model.state_dict().items())
    assert decision_on(model, name, case) == first


@pytest.mark.parametrize(("family", "name", "case"), EVERY, ids=label)
def test_the_decision_is_methods_that_exist_and_says_what_was_done(
    family: str, name: str, case: dict[str, Any], examples: Examples
) -> None:
    found = examples.result(family, name, case)
    model = dense(family)
    decision, scene = decision_and_scene(model, name, case)
    assert all(config is None or get_method(config.method) for config in decision)
    gone = [scene.attention[place] for place in scene.left_out]
    assert gone == [planned.site for planned in found.plan.attention]
    assert make_plan(scene.found.sites, scene.shapes, decision, found.plan.attention) == found.plan


@pytest.mark.parametrize(("family", "name", "case"), FIRST, ids=label)
def test_measurements_in_the_store_are_used(family: str, name: str, case: dict[str, Any], tmp_path: Path) -> None:
    """A planner that keeps measurements decides the same from them; one that keeps none just decides again."""
    model = dense(family)
    first = decision_on(model, name, case, tmp_path)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    assert decision_on(model, name, case, tmp_path) == first == decision_on(model, name, case)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()} == files


@pytest.mark.parametrize(("family", "name", "case"), EACH, ids=label)
def test_save_and_reload_give_the_same_bits(family: str, name: str, case: dict[str, Any], examples: Examples) -> None:
    result = examples.result(family, name, case)
    before = logits(result.model)
    saved = examples.checkpoint(family, name, case)
    loaded = type(result.model).from_pretrained(saved.directory).eval()
    assert_same(logits(loaded), before, saved)


@pytest.mark.parametrize(("family", "name", "case"), EACH, ids=label)
def test_without_the_import_loading_raises_or_is_right(
    family: str, name: str, case: dict[str, Any], examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = examples.result(family, name, case)
    before = logits(result.model)
    saved = examples.checkpoint(family, name, case)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "ffsplit")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "ffsplit")
    if saved.kind == "stock":
        assert_same(logits(type(result.model).from_pretrained(saved.directory).eval()), before, saved)
    else:
        with pytest.raises(RuntimeError, match="mismatched_sizes"):
            type(result.model).from_pretrained(saved.directory)


@pytest.mark.parametrize(("family", "name", "case"), FIRST, ids=label)
def test_generation_with_the_cache_equals_generation_without(
    family: str, name: str, case: dict[str, Any], examples: Examples
) -> None:
    model = examples.result(family, name, case).model
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt: dict[str, Tensor] = {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    with_cache = model.generate(**prompt, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(**prompt, use_cache=False, **options))
    assert with_cache.shape == (2, 15)


@pytest.mark.parametrize(("family", "name", "case"), FIRST, ids=label)
def test_a_resumed_run_does_not_decide_again(
    family: str, name: str, case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    known = planners()[name]

    def counted(scene: Scene, config: Any) -> Decision:
        calls.append(name)
        return known.decide(scene, config)

    monkeypatch.setitem(registry._PLANNERS, name, dataclasses.replace(known, decide=counted))
    first, second = (decided(family, name, case, journal=tmp_path / "journal") for _ in range(2))
    assert calls == [name]
    assert first.plan == second.plan
    assert torch.equal(logits(first.model), logits(second.model))
