"""Measuring the model with FFNs dropped: FinerCut, and the importance of FFNs by what becomes of the answers."""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import ffsplit
from ffsplit.budget import language
from ffsplit.budget.drop_ffns import DropFFNsConfig, importance
from ffsplit.budget.dropper import Dropper
from ffsplit.budget.finercut import FinerCutConfig, finercut
from ffsplit.budget.language import mask_gradients
from ffsplit.budget.ledger import Ledger
from ffsplit.budget.scene import Scene
from ffsplit.calibrate.batches import make_batches
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.errors import ModelError, ResumeError
from ffsplit.families import find_ffns
from ffsplit.families.blocks import Block
from ffsplit.families.forward import evaluating
from ffsplit.methods.drop import DropConfig
from ffsplit.ops.divergence import js_divergence, kl_divergence
from tests.conformance.test_methods import ids, logits
from tests.conformance.test_planners import LAYERS, dense, scene_of
from tests.unit.test_dropping import family_scene

NOTHING = DropConfig(replacement="nothing", rank=None, keep=None)


def without(dropped: Collection[int], family: str = "llama") -> PreTrainedModel:
    """A model in which the `down` of some FFNs is zero."""
    model = dense(family)
    for index in dropped:
        for parameter in model.get_submodule(find_ffns(model).sites[index].down).parameters():
            nn.init.zeros_(parameter)
    return model


@functools.cache
def damage(dropped: frozenset[int], family: str = "llama") -> float:
    reference, answers = logits(dense(family)).flatten(0, 1), logits(without(dropped, family)).flatten(0, 1)
    return float(js_divergence(reference, answers).double().mean())


@pytest.mark.parametrize("family", ["llama", "bert-mlm"])
def test_it_is_the_greedy_search_by_whole_forwards(family: str) -> None:
    scene = scene_of(dense(family))
    with evaluating(scene.model):
        found = finercut(scene, FinerCutConfig(keep=None, count=3, replacement="nothing", batches=6))
    expected: list[int] = []
    for _ in range(3):
        trials = {
            index: damage(frozenset([*expected, index]), family) for index in range(LAYERS) if index not in expected
        }
        expected.append(min(trials, key=trials.__getitem__))
    names = [site.name for site in scene.found.sites]
    assert scene.notes["dropped"] == [names[index] for index in expected]
    assert [config is not None for config in found] == [index in expected for index in range(LAYERS)]
    measured = [scene.notes["scores"][names[index]] for index in expected]
    assert measured == pytest.approx([damage(frozenset(expected[: place + 1]), family) for place in range(3)], rel=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "opt", "t5", "whisper", "vit", "albert", "xlm", "gemma2", "modernbert"])
@pytest.mark.parametrize("replacement", ["nothing", "mean"])
def test_every_kind_of_model_can_be_cut(family: str, replacement: str) -> None:
    scene = family_scene(family)
    names = [(name, type(module)) for name, module in scene.model.named_modules()]
    with evaluating(scene.model):
        found = finercut(scene, FinerCutConfig(keep=None, count=1, replacement=replacement))  # type: ignore[arg-type]
    assert sum(config is not None for config in found) == 1
    assert [(name, type(module)) for name, module in scene.model.named_modules()] == names
    assert all(0 < value < float("inf") for value in scene.notes["scores"].values())


class Counting:
    """A score that counts its calls and may fail at one of them."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, replay: BlockReplay, block: Block) -> float:
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        (_, output), *_ = replay.finish(block)
        return float(output.logits.double().square().mean())  # type: ignore[attr-defined]


def test_a_killed_run_measures_only_what_is_left(tmp_path: Path) -> None:
    model = dense("llama")
    before = logits(model)
    failing = Counting(fails_at=3)
    with evaluating(model), pytest.raises(KeyboardInterrupt):
        Dropper(scene_of(model, tmp_path), NOTHING, range(LAYERS), failing, "energy", 2).one_more([1])
    assert torch.equal(logits(model), before)
    counting, whole = Counting(), Counting()
    with evaluating(model):
        resumed = Dropper(scene_of(model, tmp_path), NOTHING, range(LAYERS), counting, "energy", 2).one_more([1])
        assert resumed == Dropper(scene_of(model), NOTHING, range(LAYERS), whole, "energy", 2).one_more([1])
    assert (counting.calls, whole.calls) == (1, 3)
    assert list(resumed) == [0, 2, 3]


def test_a_measurement_is_taken_for_no_other(tmp_path: Path) -> None:
    """Another replacement, another number of batches, another score: measured again. Another order: the same set."""
    model, counting = dense("llama"), Counting()
    mean = DropConfig(replacement="mean", rank=None, keep=None)
    with evaluating(model):
        for drop, name, batches in ((NOTHING, "a", 2), (mean, "a", 2), (NOTHING, "b", 2), (NOTHING, "a", 1)):
            dropper = Dropper(scene_of(model, tmp_path), drop, range(LAYERS), counting, name, batches)
            first = dropper.score([2, 0])
            assert dropper.score([0, 2]) == first == dropper.one_more([0])[2]
    assert counting.calls == 4 + 4 * 2  # the sets {0, 2}, then {0, 1} and {0, 3}


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_ledger_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ResumeError, match=r"a\.json is damaged"):
        Ledger(tmp_path / "a.json")


def scores(model: PreTrainedModel, **settings: Any) -> dict[int, float]:
    config = DropFFNsConfig(keep=None, count=1, replacement="nothing", **settings)
    with evaluating(model):
        return importance(scene_of(model), config)


def test_divergence_and_loss_when_dropped_alone() -> None:
    reference = logits(dense("llama")).flatten(0, 1)
    divergences, losses = scores(dense("llama"), metric="kl"), scores(dense("llama"), metric="loss")
    for index in range(LAYERS):
        model = without([index])
        expected = float(kl_divergence(reference, logits(model).flatten(0, 1)).double().mean())
        assert divergences[index] == pytest.approx(expected, rel=1e-3)
        with torch.no_grad():
            assert losses[index] == pytest.approx(float(model(input_ids=ids(), labels=ids()).loss), rel=1e-5)


def test_shapley_values_share_out_the_damage_of_dropping_all() -> None:
    reference = logits(dense("llama")).flatten(0, 1)
    values = scores(dense("llama"), metric="shapley", permutations=3)
    everything = float(kl_divergence(reference, logits(without(range(LAYERS))).flatten(0, 1)).double().mean())
    assert sum(values.values()) == pytest.approx(everything, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_mask_gradients_are_the_slope_of_the_loss(family: str) -> None:
    """Central differences, sequence by sequence, by scaling what `down` gives."""
    model = dense(family) if family == "llama" else family_scene(family).model
    model.double()
    sites, step = find_ffns(model).sites, 1e-2  # norms compute in float32, whose rounding a smaller step would show
    with evaluating(model):
        found = mask_gradients(scene_of(model))

    @torch.no_grad()
    def losses(index: int, scale: float) -> Tensor:
        down = model.get_submodule(sites[index].down)
        handle = down.register_forward_hook(lambda _module, _args, output: scale * output)
        try:
            rows = (model(input_ids=ids()).logits.double()[:, :-1].transpose(1, 2), ids()[:, 1:])
            return nn.functional.cross_entropy(*rows, reduction="none").mean(1)
        finally:
            handle.remove()

    for index in range(len(sites)):
        slope = (losses(index, 1 + step) - losses(index, 1 - step)) / (2 * step)
        assert found[index] == pytest.approx(float(slope.abs().mean()), rel=2e-2)


def test_mask_gradients_leave_no_trace_and_do_not_mind_the_batching() -> None:
    model = dense("llama")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    scene = scene_of(model)
    batches = make_batches(model, None, ids(), seq_len=32, samples=6, batch_size=3)
    together = Scene(model, scene.found, scene.shapes, batches, scene.device)
    with evaluating(model):
        assert mask_gradients(scene) == pytest.approx(mask_gradients(together), rel=1e-4)
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_mask_gradients_of_an_ffn_that_is_never_reached_are_refused() -> None:
    """They must not be taken for the next one's."""
    model = dense("llama")
    scene = scene_of(model)
    model.model.layers[1].mlp.forward = torch.zeros_like
    with evaluating(model), pytest.raises(ModelError, match=r"layers\.1\.mlp.*never reached it"):
        mask_gradients(scene)


@pytest.mark.parametrize("metric", ["loss", "mask-gradient"])
@pytest.mark.parametrize("family", ["bert-mlm", "vit", "t5"])
def test_a_loss_needs_a_language_model(metric: str, family: str) -> None:
    scene = scene_of(dense(family)) if family == "bert-mlm" else family_scene(family)
    config = DropFFNsConfig(keep=None, count=1, metric=metric)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=rf"metric='{metric}' needs a language model"):
        importance(scene, config)
    assert language.check_causal(scene_of(dense("llama")), metric) is None  # type: ignore[func-returns-value]


def test_the_report_says_what_was_measured() -> None:
    result = ffsplit.compress(
        dense("llama"),
        recipe={"method": {"method": "finercut", "count": 2, "replacement": "nothing"}},
        calibration=ids(),
        device="cpu",
    )
    notes = result.report["decision"]
    assert len(notes["dropped"]) == 2
    assert set(notes["dropped"]) == {ffn.name for ffn in result.plan.ffns if ffn.method is not None}
