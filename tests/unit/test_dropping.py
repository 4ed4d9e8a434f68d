"""Planners that drop whole FFNs: what is measured, what is chosen, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ffsplit
from ffsplit.budget.drop_ffns import DropFFNsConfig
from ffsplit.budget.dropping import DroppingConfig, check_dropping, excess, least_important
from ffsplit.budget.importance import update_importance
from ffsplit.budget.registry import entry_config
from ffsplit.budget.scene import Scene
from ffsplit.calibrate.batches import make_batches
from ffsplit.errors import BudgetError, ModelError, RecipeError
from ffsplit.families import find_ffns
from ffsplit.families.forward import evaluating
from ffsplit.ffn.shape import FFNShape
from ffsplit.ops.importance import cosine_distance, relative_update
from ffsplit.pipeline.compress import shapes_of
from tests.conformance.test_methods import ids
from tests.conformance.test_planners import dense, scene_of
from tests.tiny import tiny
from tests.unit.family_batches import family_batches

SHAPES = [FFNShape(d_model=8, d_ff=width, gated=True) for width in (16, 32, 16, 16)]


def config(**settings: Any) -> DroppingConfig:
    made = entry_config({"method": "drop-ffns", **settings})
    assert isinstance(made, DroppingConfig)
    return made


def family_scene(family: str) -> Scene:
    model = tiny(family)
    found = find_ffns(model)
    data = make_batches(model, None, family_batches(family), seq_len=24, samples=4, batch_size=2)
    return Scene(model, found, shapes_of(model, found), data, torch.device("cpu"))


@torch.no_grad()
def streams() -> list[tuple[Tensor, Tensor, Tensor]]:
    """What hooks see in an ordinary forward: block input, residual stream before the FFN, its output."""
    model = dense("llama")
    seen: list[list[Tensor]] = [[] for _ in model.model.layers]
    for row, layer in zip(seen, model.model.layers, strict=True):
        layer.input_layernorm.register_forward_pre_hook(lambda _, args, row=row: row.append(args[0].clone()))
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args, row=row: row.append(args[0].clone()))
        layer.mlp.register_forward_hook(lambda _, _args, out, row=row: row.append(out.clone()))
    model(input_ids=ids())
    return [(start.flatten(0, 1), r.flatten(0, 1), f.flatten(0, 1)) for start, r, f in seen]


def test_the_masked_block_gives_the_residual_stream() -> None:
    """In a pre-norm model the measured importance is that of the papers' formulas on the hooked streams."""
    wanted = {
        "cosine": [float(cosine_distance(r, r + f).mean()) for _, r, f in streams()],
        "relative-l1": [float(relative_update(r, r + f, 1).mean()) for _, r, f in streams()],
        "relative-l2": [float((f.norm(dim=1) / r.norm(dim=1)).mean()) for _, r, f in streams()],
        "block-influence": [float(cosine_distance(start, r + f).mean()) for start, r, f in streams()],
    }
    model = dense("llama")
    for metric, expected in wanted.items():
        with evaluating(model):
            assert update_importance(scene_of(model), metric) == pytest.approx(expected, rel=1e-4), metric


@pytest.mark.parametrize("family", ["bert", "gemma2", "t5", "whisper", "opt", "albert", "xlm", "vit", "modernbert"])
def test_every_kind_of_model_can_be_measured(family: str) -> None:
    scene = family_scene(family)
    with evaluating(scene.model):
        scores = update_importance(scene, "cosine")
    assert len(scores) == len(scene.shapes)
    assert all(0 < score < 2 for score in scores)
    assert not any(module._forward_hooks for module in scene.model.modules())


def test_an_ffn_that_does_nothing_has_no_importance() -> None:
    model = dense("bert-mlm")
    for parameter in model.get_submodule(find_ffns(model).sites[2].down).parameters():
        torch.nn.init.zeros_(parameter)
    with evaluating(model):
        scores = update_importance(scene_of(model), "cosine")
    assert scores[2] == 0.0
    assert min(scores[:2] + scores[3:]) > 0


def test_padding_does_not_count() -> None:
    scene = family_scene("bert")
    with evaluating(scene.model):
        before = update_importance(scene, "relative-l2")
        for batch in scene.data.batches:
            batch["input_ids"] += 3 * (1 - batch["attention_mask"])
        assert update_importance(scene, "relative-l2") == pytest.approx(before, rel=1e-5)


def test_influence_of_a_block_needs_blocks() -> None:
    scene = family_scene("albert")
    with pytest.raises(ModelError, match=r"block-influence.*no chain of blocks"):
        update_importance(scene, "block-influence")


def test_the_lowest_scores_go_until_the_budget_is_met() -> None:
    scores = dict(enumerate([3.0, 1.0, 2.0, 2.0]))
    assert least_important(SHAPES, config(count=1, replacement="nothing"), scores) == [1]
    assert least_important(SHAPES, config(count=3, replacement="nothing"), scores) == [1, 2, 3]
    assert least_important(SHAPES, config(keep=0.6, replacement="nothing"), scores) == [1]  # 2/5 of the parameters
    assert least_important(SHAPES, config(keep=0.59, replacement="nothing"), scores) == [1, 2]
    assert least_important(SHAPES, config(keep=0.6, replacement="mean"), scores) == [1, 2]  # the bias is counted
    assert least_important(SHAPES, config(keep=0.7, protect_first=2, replacement="nothing"), scores) == [2, 3]
    assert least_important(SHAPES, config(count=2, protect_first=1, protect_last=1), scores) == [1, 2]


def test_what_is_left_to_drop_is_counted_with_the_replacements() -> None:
    chosen, total = config(keep=0.5, replacement="low-rank", rank=2), sum(shape.parameters for shape in SHAPES)
    saved = SHAPES[1].parameters - (2 * 2 * 8 + 8)
    assert excess(SHAPES, chosen, [1]) == pytest.approx(0.5 * total - saved)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"count": 4, "protect_first": 1}, RecipeError, "only 3 of the 4 FFNs may be dropped"),
        ({"count": 1, "protect_first": 2, "protect_last": 2}, RecipeError, "leave none of the 4 FFNs"),
        ({"count": 1, "protect_last": 9}, RecipeError, "leave none of the 4 FFNs"),
        ({"keep": 0.3, "protect_last": 2, "replacement": "nothing"}, BudgetError, r"reachable keep is 0\.4000"),
        ({"count": 1, "replacement": "low-rank", "rank": 8}, None, ""),
        ({"keep": 0.001}, BudgetError, "out of reach"),
    ],
)
def test_what_cannot_be_reached_is_refused(
    settings: dict[str, Any], error: type[Exception] | None, message: str
) -> None:
    if error is None:
        check_dropping(SHAPES, config(**settings))
        return
    with pytest.raises(error, match=message):
        check_dropping(SHAPES, config(**settings))


def test_a_replacement_larger_than_the_ffn_is_refused() -> None:
    narrow = [FFNShape(d_model=64, d_ff=16, gated=True)] * 3
    with pytest.raises(RecipeError, match="'linear' is no smaller than an FFN"):
        check_dropping(narrow, config(count=1, replacement="linear"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either keep .* or count"),
        ({"keep": 0.5, "count": 2}, "either keep .* or count"),
        ({"keep": 1.0}, "keep"),
        ({"count": 1, "rank": 4}, "rank goes with"),
        ({"count": 1, "replacement": "low-rank"}, "rank goes with"),
        ({"count": 1, "metric": "taste"}, "metric"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        config(**settings)


def test_refused_before_text_is_read() -> None:
    with pytest.raises(BudgetError, match="out of reach"):
        ffsplit.compress(tiny("llama"), recipe="drop-ffns", keep=0.0001, calibration="no such file", device="cpu")


def test_the_budget_comes_from_the_command_line_too() -> None:
    result = ffsplit.compress(dense("llama"), recipe="drop-ffns", keep=0.5, calibration=ids(), device="cpu")
    assert isinstance(result.recipe.method, DropFFNsConfig)
    assert [ffn.method is not None for ffn in result.plan.ffns] == [False, True, True, True]
    assert result.plan.keep <= 0.5
