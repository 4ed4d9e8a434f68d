"""The front: what is measured, written, shown and drawn, and what a killed run leaves."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ffsplit.budget import damage
from ffsplit.budget.words import parse_axis
from ffsplit.errors import RecipeError
from ffsplit.pipeline.pareto import recipe_along
from ffsplit.pipeline.recipe import load_recipe
from ffsplit.report.front import front_figure
from tests.unit.cli_fixtures import SMALL, Call
from tests.unit.test_bad_input import check_refused

PRUNE = ("--pareto", "--methods", "prune", "--no-verify", *SMALL)


def points_of(document: dict[str, Any]) -> list[tuple[float, float]]:
    return [(point["value"], point["predicted_damage"]) for point in document["points"]]


@pytest.mark.parametrize(
    ("asked", "axis"),
    [
        (["keep"], ("keep", "keep=0.99", ())),
        (["keep=0.6", "keep = 0.4", "keep=0.6"], ("keep", "keep=0.99", ("keep=0.6", "keep=0.4"))),
        (["bits", "bits=3"], ("bits", "bits=15.9", ("bits=3",))),
        (["latency=0.7x@tokens=4"], ("latency", "latency=1x@tokens=4", ("latency=0.7x@tokens=4",))),
    ],
)
def test_an_axis(asked: list[str], axis: tuple[str, str, tuple[str, ...]]) -> None:
    assert parse_axis(asked) == axis
    load_recipe(budget=axis[1])


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["keep=0.6", "bits=3"], "one kind of budget, not keep and bits"),
        (["sparsity=0.5"], "no front"),
        (["keap"], "did you mean 'keep'"),
        (["keep=2"], "at most 1"),
        (["latency=0.7x", "latency=0.5x@tokens=4"], "one number of tokens, not 1 and 4"),
    ],
)
def test_what_is_no_axis(asked: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse_axis(asked)


def test_the_kind_is_keep_unless_the_recipe_says_another() -> None:
    recipe = load_recipe({"method": {"method": "auto", "bits": 3}})
    assert recipe_along(recipe, [], own=False)[1].kind == "keep"
    assert recipe_along(recipe, [], own=True)[1].kind == "bits"


def test_the_front_and_its_checkpoints_come_from_one_measurement(
    cli: Call, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[object] = []
    measure_one = damage._damage
    monkeypatch.setattr(damage, "_damage", lambda *given: fitted.append(given[5]) or measure_one(*given))
    out = tmp_path / "out"
    outcome = cli("compress", llama, "--out", out, *PRUNE, "--budget", "keep=0.55", "--budget", "keep=0.3")
    assert outcome.code == 0, outcome.err
    document = json.loads((out / "pareto.json").read_text())
    assert len(fitted) == 2 * (9 + 2 - 1)  # the grid, 0.55 and no second 0.3, in both layers
    assert sorted(path.name for path in out.iterdir()) == [
        "keep-0.3", "keep-0.55", "pareto.json", "pareto.png", "pareto.svg",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for budget, entry in zip((0.55, 0.3), document["checkpoints"], strict=True):
        plan = json.loads((out / entry["directory"] / "ffsplit_plan.json").read_text())
        kept = [ffn["method"]["keep"] if ffn["method"] else 1.0 for ffn in plan["ffns"]]
        assert sum(kept) / 2 <= budget + 0.02
        assert entry["value"] <= budget
        assert entry["measured_damage"] > 0
        assert entry["bytes"] == sum(file.stat().st_size for file in (out / entry["directory"]).iterdir())
        loaded = AutoModelForCausalLM.from_pretrained(out / entry["directory"])
        assert bool(loaded(torch.arange(4)[None]).logits.isfinite().all())
    for words in ("Front of predicted damage (kl)", "Checkpoints", "keep=0.55", "2 as it is", "pareto.svg"):
        assert words in outcome.out


def test_damage_falls_convexly_with_cost_and_ends_at_the_dense_model(cli: Call, llama: Path, tmp_path: Path) -> None:
    document = cli("compress", llama, "--out", tmp_path / "out", *PRUNE, "--json").document
    points = points_of(document)
    assert document["budget"] == "keep"
    assert points == sorted(points)
    assert points[-1] == (1.0, 0.0)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points)]
    assert all(slope < 0 for slope in slopes)
    assert all(first <= second + 1e-9 for first, second in pairwise(slopes))
    assert {len(point["layers"]) for point in document["points"]} == {2}
    assert document["choices"][document["points"][-1]["layers"][0]] is None
    assert len(document["uniform"]) == 9
    for alike in document["uniform"]:
        assert np.interp(alike["value"], *zip(*points, strict=True)) <= alike["predicted_damage"] + 1e-9


@pytest.mark.parametrize("kind", ["bits", "bytes", "flops"])
def test_other_kinds(cli: Call, llama: Path, tmp_path: Path, kind: str) -> None:
    methods = "prune" if kind == "flops" else "quantize"
    options = ("--methods", methods, "--budget", kind, *SMALL)
    document = cli("compress", llama, "--out", tmp_path / "out", "--pareto", *options, "--json").document
    points = points_of(document)
    assert document["budget"] == kind
    assert document["checkpoints"] == []
    assert len(points) > 2
    assert points[-1][1] == 0
    assert points[-1][0] == (pytest.approx({"bits": 16, "flops": 1}[kind]) if kind != "bytes" else points[-1][0])


def test_a_budget_that_the_dense_model_meets_leaves_it_as_it_is(cli: Call, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = ("compress", llama, "--out", out, "--budget", "bytes=1GB", "--methods", "prune", *SMALL)
    assert cli(*run).code == 0
    dense, same = (AutoModelForCausalLM.from_pretrained(place) for place in (llama, out))
    assert torch.equal(dense(torch.arange(9)[None]).logits, same(torch.arange(9)[None]).logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--budget", "keep=0.6", "--budget", "bits=3"), ("one kind of budget, not keep and bits",)),
        (("--keep", "0.6"), ("--budget keep=VALUE",)),
        (("--recipe", "svd"), ("--pareto needs the recipe auto, not svd",)),
        (("--recipe", "quantize"), ("--pareto needs the recipe auto, not quantize",)),
        (("--methods", "prun"), ("did you mean 'prune'",)),
        (("--budget", "keep=0.01", "--methods", "prune"), ("keep=0.01 is out of reach", "smallest reachable")),
        (("--budget", "bytes=1kB", "--methods", "quantize"), ("bytes=1kB is out of reach", "0.1 MB for the whole")),
        (("--budget", "bits=1", "--methods", "quantize"), ("bits=1.0 is out of reach", "smallest reachable")),
    ],
)
def test_refused_without_a_trace(
    cli: Call, llama: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...],
    words: tuple[str, ...],
) -> None:  # fmt: skip
    def measured(*_: object) -> float:
        raise AssertionError("measured before the budget was refused")

    monkeypatch.setattr(damage, "_damage", measured)
    check_refused(cli("compress", llama, "--out", untouched, "--pareto", *options, *SMALL), *words)


def test_an_output_of_another_kind_is_not_replaced(cli: Call, compressed: Path) -> None:
    check_refused(cli("compress", compressed, "--out", compressed, "--overwrite", *PRUNE), "holds no pareto.json")


def test_a_killed_run_goes_on_and_an_earlier_output_is_replaced(
    cli: Call, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run = ("compress", llama, "--out", out, *PRUNE)
    with monkeypatch.context() as patch:
        patch.setattr("ffsplit.report.plots.save_figure", interrupted)
        assert cli(*run, "--budget", "keep=0.5", "--budget", "keep=0.3").code == 130
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(damage, "_damage", interrupted)  # measurements are there
        patch.setattr("ffsplit.checkpoint.save.save", interrupted)  # and so is the checkpoint
        resumed = cli(*run, "--budget", "keep=0.5")
    assert resumed.code == 0, resumed.err
    assert "resuming" in resumed.err
    assert sorted(path.name for path in out.iterdir()) == ["keep-0.5", "pareto.json", "pareto.png", "pareto.svg"]
    assert cli(*run).code == 2
    assert cli(*run, "--overwrite").code == 0
    assert sorted(path.name for path in out.iterdir()) == ["pareto.json", "pareto.png", "pareto.svg"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def interrupted(*_: object, **__: object) -> Any:
    raise KeyboardInterrupt


def document_of(damages: list[float], **checkpoint: Any) -> dict[str, Any]:
    points = [{"value": 0.2 * (i + 1), "predicted_damage": d, "layers": [0]} for i, d in enumerate(damages)]
    named = {"budget": "keep=0.4", "value": 0.4, "predicted_damage": 0.1, "measured_damage": 0.2, **checkpoint}
    return {
        "budget": "keep", "unit": "share", "metric": "kl", "points": points, "checkpoints": [named],
        "uniform": [{"value": 0.5, "predicted_damage": 0.3}, {"value": 0.5, "predicted_damage": None}],
    }  # fmt: skip


def test_the_figure_shows_the_front_and_names_the_checkpoints() -> None:
    figure = front_figure(document_of([1.0, 0.1, 0.01, 0.0]))
    (axes,) = figure.axes
    line, dots, saved = axes.lines
    assert list(line.get_ydata()) == [1.0, 0.1, 0.01]
    assert (list(dots.get_ydata()), list(saved.get_ydata())) == ([0.3], [0.2])
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.texts] == ["keep=0.4"]
    assert [text.get_text() for text in figure.legends[0].texts][-1] == "checkpoints, measured"


def test_the_figure_of_a_front_that_does_no_damage_and_of_checkpoints_left_dense() -> None:
    (axes,) = front_figure(document_of([0.0], value=None, predicted_damage=None, measured_damage=None)).axes
    assert list(axes.lines[0].get_ydata()) == [0.0]
    assert axes.get_yscale() == "linear"
    (axes,) = front_figure(document_of([1.0, 0.5], measured_damage=None)).axes
    assert list(axes.lines[-1].get_ydata()) == [0.1]


def test_checkpoints_too_close_for_names_of_their_own_share_one() -> None:
    document = document_of([1.0, 0.1, 0.01])
    (first,) = document["checkpoints"]
    near, far = {**first, "budget": "keep=0.41", "value": 0.41}, {**first, "budget": "keep=0.6", "value": 0.6}
    (axes,) = front_figure({**document, "checkpoints": [far, near, first]}).axes
    assert [text.get_text() for text in axes.texts] == ["keep=0.4, 0.41", "keep=0.6"]
