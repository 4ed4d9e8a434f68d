"""Whole FFNs removed: the ladder of replacements, and empty sums through save, reload and generation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import ffsplit
from ffsplit.calibrate.cache import Activations, TensorCache
from ffsplit.calibrate.layer import LayerData
from ffsplit.checkpoint.decompress import _full_width
from ffsplit.errors import BudgetError, RecipeError
from ffsplit.ffn.projections import Dense, LowRank
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.sum import SumFFN
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods.registry import get_method, method_config
from ffsplit.pipeline.recipe import load_recipe
from tests.conformance.test_methods import FAMILIES, assert_same, compressed, ids, logits, sums
from tests.tiny import tiny

D_MODEL, D_FF, TOKENS = 12, 30, 90
SHAPE = FFNShape(d_model=D_MODEL, d_ff=D_FF, gated=False, up_bias=True, down_bias=True)
LADDER: list[dict[str, Any]] = [
    {"replacement": "nothing"},
    {"replacement": "mean"},
    {"rank": 2, "ridge": 0.0},
    {"rank": 6, "ridge": 0.0},
    {"replacement": "linear", "ridge": 0.0},
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def cache() -> Iterator[TensorCache]:
    with TensorCache() as made:
        yield made


def layer(cache: TensorCache, inputs: Tensor, corrections: Tensor | None = None) -> LayerData:
    """A plain FFN with biases, its inputs in two sequences."""
    ffn = FFNWeights(
        random(D_FF, D_MODEL, seed=1),
        random(D_MODEL, D_FF, seed=2),
        nn.GELU(),
        up_bias=random(D_FF, seed=3),
        down_bias=random(D_MODEL, seed=4),
    )
    stores = []
    for name, rows in (("in-", inputs), ("correction-", corrections)):
        store = Activations(cache, name)
        for chunk in () if rows is None else rows.split(60):
            store.append(chunk)
        stores.append(store)
    return LayerData(ffn, stores[0], corrections=None if corrections is None else stores[1])


def dropped(data: LayerData, **settings: Any) -> SumFFN:
    config, drop = method_config({"method": "drop", **settings}), get_method("drop")
    module = drop.apply(data, config)
    assert module.spec == drop.plan(SHAPE, config)
    return module


def error(data: LayerData, module: SumFFN, x: Tensor, target: Tensor | None = None) -> float:
    wanted = data.ffn(x) if target is None else target
    with torch.no_grad():
        return float((wanted - module(x)).double().square().sum())


def test_every_rung_of_the_ladder_is_better_than_the_one_before(cache: TensorCache) -> None:
    x = random(TOKENS, D_MODEL) + 1.0
    data = layer(cache, x)
    errors = [error(data, dropped(data, **settings), x) for settings in LADDER]
    assert errors[0] == pytest.approx(float(data.ffn(x).double().square().sum()))
    assert all(better < 0.98 * worse for worse, better in pairwise(errors))


def test_nothing_is_nothing(cache: TensorCache) -> None:
    module = dropped(layer(cache, random(0, D_MODEL)), replacement="nothing")
    assert not list(module.parameters())
    assert torch.equal(module(random(3, 2, D_MODEL)), torch.zeros(3, 2, D_MODEL))
    assert module.spec.describe() == "dropped"


def test_the_mean_is_that_of_the_outputs(cache: TensorCache) -> None:
    x = random(TOKENS, D_MODEL)
    data = layer(cache, x)
    module = dropped(data, replacement="mean")
    assert module.bias is not None
    torch.testing.assert_close(module.bias.detach(), data.ffn(x).double().mean(0).float())


def test_the_linear_map_is_the_least_squares_fit(cache: TensorCache) -> None:
    x = random(TOKENS, D_MODEL) * torch.logspace(-1, 1, D_MODEL) + 2.0
    data = layer(cache, x)
    module = dropped(data, replacement="linear", ridge=0.0)
    assert isinstance(module.linear, Dense)
    columns = torch.cat([torch.ones(TOKENS, 1), x], dim=1).double()
    expected = columns @ torch.linalg.lstsq(columns, data.ffn(x).double()).solution
    torch.testing.assert_close(module(x).detach(), expected.float(), rtol=1e-4, atol=1e-3)


def test_a_linear_ffn_is_replaced_exactly(cache: TensorCache) -> None:
    x = random(TOKENS, D_MODEL)
    data = layer(cache, x)
    data.ffn.up.mul_(1e-3)  # around zero GELU is half the identity, with a bend far below float32's rounding
    data.ffn.up_bias.zero_()  # type: ignore[union-attr]
    exact = error(data, dropped(data, replacement="linear", ridge=0.0), x)
    assert exact < 1e-4 * error(data, dropped(data, replacement="mean"), x)


@pytest.mark.parametrize("settings", LADDER[1:], ids=str)
def test_the_drift_correction_is_part_of_the_target(cache: TensorCache, settings: dict[str, Any]) -> None:
    x = random(TOKENS, D_MODEL)
    correction = 5.0 + 3.0 * x @ random(D_MODEL, D_MODEL, seed=7)
    plain, corrected = layer(cache, x), layer(cache, x, correction)
    target = plain.ffn(x) + correction
    without, with_it = dropped(plain, **settings), dropped(corrected, **settings)
    assert error(plain, with_it, x, target) < 0.95 * error(plain, without, x, target)
    if settings == {"replacement": "mean"}:
        assert with_it.bias is not None
        torch.testing.assert_close(with_it.bias.detach(), target.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"replacement": "linear"}, {"rank": 3}, {"rank": 3, "ridge": 0.0}], ids=str)
@pytest.mark.parametrize("tokens", [1, 2])
def test_few_tokens_and_dead_inputs(cache: TensorCache, settings: dict[str, Any], tokens: int) -> None:
    x = torch.zeros(tokens, D_MODEL)
    x[-1, 0] = 1.0
    data = layer(cache, x)
    module = dropped(data, **settings)
    with torch.no_grad():
        out = module(x)
    assert bool(torch.isfinite(out).all())
    torch.testing.assert_close(out.mean(0), data.ffn(x).mean(0), rtol=1e-4, atol=1e-4)


def test_a_ridge_pulls_to_the_mean(cache: TensorCache) -> None:
    x = random(TOKENS, D_MODEL) + 3.0
    data = layer(cache, x)
    mean = dropped(data, replacement="mean")(x)
    torch.testing.assert_close(dropped(data, replacement="linear", ridge=1e9)(x), mean, rtol=1e-3, atol=1e-3)


def test_a_budget_is_a_rank_and_at_last_the_full_map() -> None:
    drop, shape = get_method("drop"), FFNShape(d_model=16, d_ff=64, gated=True)
    for keep in (0.02, 0.05, 0.06, 0.08, 0.0885, 0.1, 0.9):
        spec = drop.plan(shape, method_config({"method": "drop", "keep": keep}))
        assert spec.linear is not None
        assert spec.parameters <= keep * shape.parameters
        full = keep * shape.parameters >= 16 * 16 + 16
        assert spec.linear.kind == ("dense" if full else "low_rank")
        assert full or spec.parameters + 2 * 16 > keep * shape.parameters


def test_the_smallest_reachable_budget_can_be_reached() -> None:
    drop = get_method("drop")
    with pytest.raises(BudgetError, match=r"the smallest reachable keep is 0\.0472") as refused:
        drop.plan(SHAPE, method_config({"method": "drop", "keep": 0.01}))
    assert "replacement: mean" in str(refused.value)
    assert drop.plan(SHAPE, method_config({"method": "drop", "keep": 0.0473})).linear.parameters == 2 * D_MODEL


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replacement": "mean", "keep": 0.5}, "keep goes with replacement='low-rank'"),
        ({"replacement": "nothing", "rank": 2}, "rank goes with replacement='low-rank'"),
        ({"replacement": "low-rank"}, "needs either rank or keep"),
        ({"rank": 2, "keep": 0.5}, "needs either rank or keep"),
        ({"replacement": "narrow"}, "replacement"),
        ({"keep": 0.0}, "keep"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        method_config({"method": "drop", **settings})


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(BudgetError, match="rank=13 is above d_model=12"):
        get_method("drop").plan(SHAPE, method_config({"method": "drop", "rank": 13}))


def test_a_recipe_needs_no_budget_but_may_have_one() -> None:
    assert load_recipe("drop").method.stand_in == "mean"  # type: ignore[attr-defined]
    assert load_recipe("drop", keep=0.1).method.stand_in == "low-rank"  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="drop takes no bits"):
        load_recipe("drop", bits=4.0)


@pytest.mark.parametrize("replacement", ["nothing", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropped_ffn_is_stored_and_loud(
    family: str, replacement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty sum has no tensor to miss: only the tripwire tells that the checkpoint is not an ordinary one."""
    result = compressed(family, "drop", {"replacement": replacement})
    assert [module.spec.describe() for module in sums(result.model)] == [
        {"nothing": "dropped", "mean": "constant"}[replacement]
    ] * 2
    before = logits(result.model)
    saved = ffsplit.save(result, tmp_path / "out")
    assert saved.kind == "ffsplit"
    loaded = type(result.model).from_pretrained(saved.directory).eval()
    assert_same(logits(loaded), before, saved)
    if replacement == "mean" and family in ("llama", "phi3"):
        with pytest.raises(ffsplit.ModelError, match="an output bias that this family has no place for"):
            ffsplit.decompress(loaded)
    else:
        torch.testing.assert_close(logits(ffsplit.decompress(loaded)), before, rtol=1e-4, atol=1e-5)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "ffsplit")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "ffsplit")
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        type(result.model).from_pretrained(saved.directory)


def test_dense_weights_of_a_dropped_ffn_are_where_it_was() -> None:
    """The meta device stands for any other than the CPU."""
    result = compressed("llama", "drop", {"replacement": "nothing"})
    result = replace(result, model=copy.deepcopy(result.model).to("meta"))
    weights = _full_width(result.model, tiny("llama"), result.sites[0])
    assert {tensor.device.type for tensor in weights.tensors().values()} == {"meta"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_generation_without_ffns(family: str) -> None:
    model = compressed(family, "drop", {"replacement": "nothing"}).model
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    assert torch.equal(
        model.generate(**prompt, use_cache=True, **options), model.generate(**prompt, use_cache=False, **options)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropping_is_what_masking_the_down_projection_is(family: str) -> None:
    model = tiny(family)
    for site in ffsplit.find_ffns(model).sites:
        for parameter in model.get_submodule(site.down).parameters():
            nn.init.zeros_(parameter)
    torch.testing.assert_close(logits(compressed(family, "drop", {"replacement": "nothing"}).model), logits(model))


def test_low_rank_and_full_map_are_stored_as_such(cache: TensorCache) -> None:
    data = layer(cache, random(TOKENS, D_MODEL))
    low_rank = dropped(data, rank=3).linear
    assert isinstance(low_rank, LowRank)
    assert low_rank.a.shape == (D_MODEL, 3)
