"""The allocator: costs, candidates, the choice, and what is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ffsplit
from ffsplit.budget import cost as cost_module
from ffsplit.budget import damage as damage_module
from ffsplit.budget.auto import AutoConfig
from ffsplit.budget.cost import CountedCost, LatencyCost, cost_of, dense_spec, parse_bytes, parse_latency
from ffsplit.budget.library import averages, library, variants
from ffsplit.errors import BudgetError, FFSplitError, RecipeError
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.budgets import average_bits, dense_branch_spec, sum_spec
from ffsplit.methods.registry import get_method
from tests.conformance.test_methods import ids
from tests.tiny import tiny
from tests.unit.test_objective import batches, scene

SHAPE = FFNShape(32, 80, gated=True)
MIXED = {"method": "mixed-bits", "group": 16}


def auto(**fields: Any) -> dict[str, Any]:
    return {"method": {"method": "auto", "windows": 2, **fields}}


def run(recipe: dict[str, Any], family: str = "llama", **options: Any) -> ffsplit.CompressionResult:
    return ffsplit.compress(tiny(family), recipe=recipe, calibration=ids(), device="cpu", **options)


def plans(result: ffsplit.CompressionResult) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = result.report["decision"]["allocation"]["plans"]
    return found


@pytest.mark.parametrize(("text", "size"), [("80MB", 80_000_000), ("1.5 GB", 1_500_000_000), ("7b", 7), (123, 123)])
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["80", "MB", "8 MiB", "-3MB", ""])
def test_no_sizes(text: str) -> None:
    with pytest.raises(RecipeError, match="write a size such as 80MB"):
        parse_bytes(text)


@pytest.mark.parametrize(("text", "share"), [("0.7x@tokens=16", (0.7, 16)), ("0.5", (0.5, 1)), ("0.9x", (0.9, 1))])
def test_latencies(text: str, share: tuple[float, int]) -> None:
    assert parse_latency(text) == share


@pytest.mark.parametrize("text", ["0x", "fast", "0.7x@tokens=0", "0.7y"])
def test_no_latencies(text: str) -> None:
    with pytest.raises(RecipeError, match="share of the dense FFNs' time"):
        parse_latency(text)


def test_counted_costs_are_those_of_the_structure() -> None:
    here = scene(tiny("llama"), batches())
    dense = dense_spec(here.shapes[0])
    half = sum_spec(here.shapes[0], [dense_branch_spec(here.shapes[0], 40)], bias=False)
    for budget, whole, part in (("keep", dense.parameters, half.parameters), ("flops", dense.macs, half.macs)):
        counted = cost_of(here, budget, 0.5)
        assert (counted.of(dense, 0), counted.of(half, 0)) == (whole, part)
        assert counted.limit == pytest.approx(whole)  # two equal FFNs, half of both
    bits = cost_of(here, "bits", 4.0)
    assert bits.of(dense, 0) == 16 * dense.parameters
    assert bits.limit == 4 * 2 * here.shapes[0].weights


def test_bytes_are_those_of_the_whole_model() -> None:
    model = tiny("llama")
    here = scene(model, batches())
    size = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    counted = cost_of(here, "bytes", size)
    assert isinstance(counted, CountedCost)
    assert sum(counted.of(dense_spec(shape), 0) for shape in here.shapes) == pytest.approx(counted.limit)
    assert f"{size / 1e6:.1f} MB" in counted.describe(counted.limit)
    with pytest.raises(BudgetError, match="without any FFN"):
        cost_of(here, "bytes", "1KB")


def test_every_structure_is_timed_once_and_in_turns_with_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def timed(scene: Any, specs: Any, layer: int, tokens: int) -> list[float]:
        seen.append(tokens)
        return [spec.parameters * 1e-9 for spec in specs]

    monkeypatch.setattr(cost_module, "timed", timed)
    here = scene(tiny("llama"), batches())
    cost = cost_of(here, "latency", "0.5x@tokens=3")
    half = sum_spec(here.shapes[0], [dense_branch_spec(here.shapes[0], 40)], bias=False)
    assert isinstance(cost, LatencyCost)
    assert cost.of(half, 0) == cost.of(half, 1) == pytest.approx(cost.limit / 2)
    assert seen == [3, 3]
    assert cost.describe(cost.limit).startswith("0.500 of the dense FFNs' time at 3 tokens")


def test_a_real_clock_gives_positive_times() -> None:
    here = scene(tiny("llama"), batches())
    assert all(seconds > 0 for seconds in cost_module.timed(here, [dense_spec(shape) for shape in here.shapes], 0, 2))


def test_a_method_is_tried_along_its_grid() -> None:
    keeps = [config.keep for config in variants(SHAPE, {"method": "prune"}, "keep", 0.55)]  # type: ignore[attr-defined]
    assert 0.55 in keeps
    assert keeps == sorted(keeps)
    assert {config.method for config in variants(SHAPE, {"method": "drop", "replacement": "mean"}, "keep")} == {"drop"}


def test_a_block_with_a_budget_is_tried_there_only() -> None:
    (config,) = variants(SHAPE, {"method": "prune", "keep": 0.3}, "keep", 0.5)
    assert config.keep == 0.3  # type: ignore[attr-defined]


def test_a_method_that_cannot_be_set_up_is_refused_and_not_dropped() -> None:
    with pytest.raises(RecipeError, match="scor"):
        list(variants(SHAPE, {"method": "prune", "scor": "leverage"}, "keep"))


def test_averages_lie_around_the_budget() -> None:
    assert 2.9 in averages(2.9)
    assert min(averages(2.9)) >= 0.8 * 2.9
    assert len(averages(None)) > len(averages(2.9))


def test_splits_meet_their_average_with_everything_counted() -> None:
    here = scene(tiny("llama"), batches())
    rows = library(here, [MIXED], "bits", 4.5)
    for row, shape in zip(rows, here.shapes, strict=True):
        assert row[0].config is None
        assert row[1].config.neurons == {2: shape.d_ff}  # type: ignore[union-attr]
        assert len(row) > 3
        for label, config in row[2:]:
            assert config is not None
            spent = average_bits(get_method(config.method).plan(shape, config), shape)
            assert spent <= float(label.split(" at ")[1].removesuffix(" bits"))
    assert [one.label for one in rows[0]] == [one.label for one in rows[1]]


@pytest.mark.parametrize("recipe", [auto(keep=0.6), auto(bits=4.5, methods=[MIXED]), auto(flops=0.6)])
@pytest.mark.parametrize("family", ["llama", "bert-mlm", "t5"])
def test_never_worse_than_one_method_for_all_layers(family: str, recipe: dict[str, Any]) -> None:
    result = run(recipe, family)
    found = plans(result)
    assert [plan["plan"] for plan in found] == ["allocation", "uniform"]
    assert found[0]["predicted_damage"] <= found[1]["predicted_damage"] * (1 + 1e-5) + 1e-9
    chosen = result.report["decision"]["allocation"]["chosen"]
    measured = {plan["plan"]: plan["measured_damage"] for plan in found}
    assert measured[chosen] == min(measured.values())
    assert len(result.report["layers"]) == sum(ffn.method is not None for ffn in result.plan.ffns)


def test_the_chosen_plan_is_what_was_tried(tmp_path: Path) -> None:
    """The fits of the trial are used, not repeated: each FFN is fitted once for each plan."""
    result = run(auto(keep=0.5), journal=tmp_path)
    kept = list(tmp_path.glob("fits-*"))
    assert len(kept) == 1
    assert len(list(kept[0].glob("ffn-*.safetensors"))) == len(result.report["layers"])
    assert result.plan.keep <= 0.5


@pytest.mark.parametrize("method", [None, {"method": "prune", "keep": 0.95}], ids=["dense", "pruned"])
def test_overrides_count_in_the_budget(method: dict[str, Any] | None) -> None:
    """Half of all parameters, however little is left for the other FFN when one of the two is settled."""
    override = {"ffns": "0", "method": method}
    result = run(auto(keep=0.6, methods=["prune"]) | {"overrides": [override]})
    assert 0.5 < result.plan.keep <= 0.6
    assert plans(result)[0]["value"] == pytest.approx(result.plan.keep, abs=1e-4)
    kept = result.plan.ffns[0]
    assert kept.spec.parameters >= 0.94 * kept.dense_shape.parameters


def test_a_budget_that_overrides_put_out_of_reach_is_refused() -> None:
    with pytest.raises(BudgetError, match="smallest reachable is"):
        run(auto(keep=0.45, methods=["prune"]) | {"overrides": [{"ffns": "0", "method": None}]})


def test_without_a_trial_the_prediction_is_trusted() -> None:
    (plan,) = plans(run(auto(keep=0.5, trials=1)))
    assert plan["measured_damage"] is None


def test_measurements_serve_other_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(auto(keep=0.5, trials=1), measured=tmp_path)
    fitted: list[Any] = []
    original = damage_module._damage
    monkeypatch.setattr(damage_module, "_damage", lambda *args: fitted.append(args[5]) or original(*args))
    run(auto(keep=0.7, trials=1), measured=tmp_path)
    assert not fitted
    run(auto(keep=0.65, trials=1), measured=tmp_path)
    assert {config.keep for config in fitted if hasattr(config, "keep")} == {0.65}


def test_measurements_of_another_text_are_not_used(tmp_path: Path) -> None:
    run(auto(keep=0.5, trials=1), measured=tmp_path)
    other = ids().flip(1)
    ffsplit.compress(tiny("llama"), recipe=auto(keep=0.5, trials=1), calibration=other, device="cpu", measured=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_measurements_of_another_version_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(auto(keep=0.6, methods=["prune"], trials=1), measured=tmp_path)
    monkeypatch.setattr("ffsplit.pipeline.job.versions", lambda: {"ffsplit": "0"})
    run(auto(keep=0.6, methods=["prune"], trials=1), measured=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_budget_changes_nothing() -> None:
    result = run(auto(keep=1.0))
    with torch.no_grad():
        found, expected = result.model(input_ids=ids()).logits, tiny("llama")(input_ids=ids()).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (auto(keep=0.5, bits=4.0), "give exactly one budget"),
        (auto(bytes="80 potatoes"), "write a size such as 80MB"),
        (auto(latency="soon"), "share of the dense FFNs' time"),
        (auto(keep=0.5, methods=["prun"]), "did you mean 'prune'"),
        (auto(keep=0.5, methods=["fused"]), r"unknown method 'fused'.*Known: ((?!fused|shared|unbias)[^(])*\(got"),
        (auto(keep=0.5, metric="cosine"), "metric"),
        (auto(keep=0.004, methods=["prune"]), "smallest reachable keep"),
        (auto(bits=1.0, methods=[MIXED]), r"bits=1.0 is out of reach; the smallest reachable is bits 3\."),
        (auto(bytes="1KB"), "without any FFN"),
    ],
)
def test_what_cannot_work_is_refused(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(FFSplitError, match=message):
        run(recipe)


def test_no_budget_at_all() -> None:
    with pytest.raises(ValueError, match="got none"):
        AutoConfig.model_validate({})
