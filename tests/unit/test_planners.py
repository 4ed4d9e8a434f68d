"""Planners in the pipeline: decided once, resumed from the journal, refused before work starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import ffsplit
from ffsplit.budget import registry
from ffsplit.budget.registry import Decision, PlannerConfig, entries, planner
from ffsplit.budget.scene import Scene
from ffsplit.errors import RecipeError
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.registry import method_config
from ffsplit.pipeline.recipe import load_recipe
from tests.conformance.test_methods import ids
from tests.tiny import tiny


class EveryOtherConfig(PlannerConfig):
    """A planner for these tests."""

    method: Literal["every-other"] = "every-other"
    first: int = 0


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """Registers a planner that prunes every other FFN and notes the input energies that it saw."""
    entries()
    monkeypatch.setattr(registry, "_PLANNERS", dict(registry._PLANNERS))
    seen: list[list[float]] = []

    def check(shapes: Sequence[FFNShape], config: EveryOtherConfig) -> None:
        if config.first >= len(shapes):
            raise RecipeError(f"first={config.first}: there are {len(shapes)} FFNs")

    @planner("every-other", summary="s", paper="p", budget=(), as_sum="a", config=EveryOtherConfig, check=check)
    def decide(scene: Scene, config: EveryOtherConfig) -> Decision:
        seen.append([float(data.moments.input_gram.trace()) for _, data in scene.layers()])
        pruned = method_config({"method": "prune", "keep": 0.5})
        return [pruned if index % 2 == config.first else None for index in range(len(scene.shapes))]

    return seen


def run(recipe: Any = "every-other", **options: Any) -> ffsplit.CompressionResult:
    return ffsplit.compress(tiny("llama"), recipe=recipe, calibration=ids(), device="cpu", **options)


def test_a_decision_is_carried_out(decisions: list[list[float]]) -> None:
    result = run()
    assert [ffn.method and ffn.method.method for ffn in result.plan.ffns] == ["prune", None]
    assert result.recipe.method.method == "every-other"
    assert len(decisions) == 1


def test_statistics_are_those_of_the_dense_model(decisions: list[list[float]]) -> None:
    run()
    model, expected = tiny("llama"), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: expected.append(float(args[0].double().square().sum())))
    with torch.no_grad():
        model(input_ids=ids())
    assert decisions[0] == pytest.approx(expected, rel=1e-4)


def test_overrides_win(decisions: list[list[float]]) -> None:
    overrides = [
        {"ffns": "0", "method": None},
        {"ffns": "1", "method": {"method": "quantize", "code_bits": 4, "group": 16}},
    ]
    result = run({"method": {"method": "every-other"}, "overrides": overrides})
    assert [ffn.method and ffn.method.method for ffn in result.plan.ffns] == [None, "quantize"]


def test_a_resumed_run_does_not_decide_again(decisions: list[list[float]], tmp_path: Path) -> None:
    for _ in range(2):
        result = run(journal=tmp_path / "journal")
        assert result.plan.ffns[0].method is not None
    assert len(decisions) == 1


@pytest.mark.parametrize("changed", [{"seed": 1}, {"batch_size": 3}, {"fold_norms": True}])
def test_measurements_of_another_run_are_not_taken(
    decisions: list[list[float]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: dict[str, Any]
) -> None:
    stores: list[Path | None] = []
    monkeypatch.setattr(Scene, "layers", lambda scene: stores.append(scene.store) or iter(()))
    for options in ({}, {}, changed):
        run(measured=tmp_path, **options)
    assert stores[0] == stores[1] != stores[2]
    assert all(store is not None and store.parent == tmp_path for store in stores)


def test_what_cannot_work_is_refused_before_text_is_read(decisions: list[list[float]]) -> None:
    with pytest.raises(RecipeError, match="first=7: there are 2 FFNs"):
        ffsplit.compress(
            tiny("llama"),
            recipe={"method": {"method": "every-other", "first": 7}},
            calibration="no such file",
            device="cpu",
        )
    assert not decisions


def test_an_override_takes_no_planner(decisions: list[list[float]]) -> None:
    with pytest.raises(RecipeError, match="every-other decides over all FFNs"):
        load_recipe({"method": "prune", "overrides": [{"ffns": "0", "method": "every-other"}]}, keep=0.5)
