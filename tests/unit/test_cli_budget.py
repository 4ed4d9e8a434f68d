"""Budgets in words, from the text to the recipe and the table of what was decided."""

from __future__ import annotations

from pathlib import Path

import pytest

import ffsplit
from ffsplit.budget.words import KINDS, parse_budget
from ffsplit.checkpoint.card import model_card
from ffsplit.cli.allocation import in_words
from ffsplit.errors import RecipeError
from ffsplit.pipeline.recipe import load_recipe
from tests.conformance.test_methods import ids
from tests.tiny import tiny
from tests.unit.cli_fixtures import SMALL, Call
from tests.unit.test_bad_input import check_refused


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("keep=0.6", ("keep", 0.6)),
        (" keep = 1 ", ("keep", 1.0)),
        ("bits=3.2", ("bits", 3.2)),
        ("flops=0.6", ("flops", 0.6)),
        ("sparsity=0", ("sparsity", 0.0)),
        ("bytes=80MB", ("bytes", "80MB")),
        ("bytes=1500", ("bytes", "1500B")),
        ("latency=0.7x@tokens=1", ("latency", "0.7x@tokens=1")),
        ("latency=0.7", ("latency", "0.7")),
    ],
)
def test_a_budget_in_words(text: str, parsed: tuple[str, object]) -> None:
    assert parse_budget(text) == parsed
    assert parsed[0] in KINDS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("keap=0.6", "did you mean 'keep'"),
        ("0.6", "unknown kind '0.6'"),
        ("keep", "write a kind and its value"),
        ("keep=", "write a kind and its value"),
        ("keep=0", "above 0 and at most 1"),
        ("keep=nan", "above 0 and at most 1"),
        ("keep=60%", "above 0 and at most 1"),
        ("flops=1.5", "above 0 and at most 1"),
        ("bits=17", "above 0 and at most 16"),
        ("bits=inf", "above 0 and at most 16"),
        ("sparsity=1", "at least 0 and below 1"),
        ("bytes=0MB", "more than no bytes"),
        ("bytes=-5", "80MB"),
        ("bytes=80MiB", "80MB"),
        ("latency=0x", "0.7x@tokens=1"),
        ("latency=fast", "0.7x@tokens=1"),
    ],
)
def test_what_is_no_budget(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse_budget(text)


@pytest.mark.parametrize("text", ["keep=0.6", "bits=3.2", "bytes=80MB", "flops=0.6", "latency=0.7x@tokens=1"])
def test_a_budget_alone_means_the_allocator(text: str) -> None:
    method = load_recipe(budget=text).method
    assert (method.method, method.budget, method.value) == ("auto", *parse_budget(text))  # type: ignore[attr-defined]


def test_a_budget_is_that_of_the_recipe_where_one_is_named() -> None:
    assert load_recipe("prune", budget="keep=0.6") == load_recipe("prune", keep=0.6)
    assert load_recipe("ffsplit-best", budget="bits=3.5") == load_recipe("ffsplit-best", bits=3.5)
    assert load_recipe().method.method == "ffsplit"


def test_a_budget_replaces_the_recipes() -> None:
    first = load_recipe({"method": {"method": "auto", "bytes": "80MB", "windows": 3}})
    method = load_recipe(first, budget="keep=0.5").method
    assert (method.keep, method.bytes, method.windows) == (0.5, None, 3)  # type: ignore[attr-defined]


def test_methods_fill_the_allocator() -> None:
    method = load_recipe(budget="keep=0.6", methods=["prune", "svd"]).method
    assert method.methods == ({"method": "prune"}, {"method": "svd"})  # type: ignore[attr-defined]
    assert load_recipe(methods=["prune"], keep=0.6).method.method == "auto"


def test_one_budget_only() -> None:
    with pytest.raises(RecipeError, match="keep or budget='bits=3', not both"):
        load_recipe(keep=0.5, budget="bits=3")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--budget", "keap=0.6"), ("did you mean 'keep'",)),
        (("--budget", "keep=0.6", "--keep", "0.6"), ("--keep or --budget keep=0.6", "not both")),
        (("--budget", "keep=0.6", "--bits", "4"), ("--bits or --budget keep=0.6", "not both")),
        (("--budget", "keep=0.6", "--sparsity", "0.5"), ("--sparsity or --budget", "not both")),
        (("--budget", "keep=0.6", "--budget", "keep=0.7"), ("one checkpoint has one budget",)),
        (("--budget", "bytes=80MB", "--recipe", "prune"), ("prune takes no bytes", "its budget is keep")),
        (("--budget", "sparsity=0.5"), ("auto takes no sparsity", "keep or bits or bytes or flops or latency")),
        (("--budget", "keep=0.6", "--methods", "prun,svd"), ("unknown method 'prun'", "did you mean 'prune'")),
        (("--budget", "keep=0.6", "--methods", ","), ("name at least one method",)),
        (("--recipe", "svd", "--budget", "keep=0.6", "--methods", "prune"), ("svd does not choose", "auto does")),
    ],
)
def test_refused_before_the_weights_are_read(
    cli: Call, llama: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...],
    words: tuple[str, ...],
) -> None:  # fmt: skip
    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("ffsplit.pipeline.load.Source.load", read)
    check_refused(cli("compress", llama, "--out", untouched, *options, *SMALL), *words)


def test_out_of_reach_names_the_smallest(cli: Call, llama: Path, untouched: Path) -> None:
    outcome = cli("compress", llama, "--out", untouched, "--budget", "keep=0.01", "--methods", "prune", *SMALL)
    check_refused(outcome, "keep=0.01 is out of reach with prune", "smallest reachable keep is 0.0938")


def test_the_plan_is_shown_with_its_damages(cli: Call, llama: Path, tmp_path: Path) -> None:
    options = ("--out", tmp_path / "out", "--budget", "keep=0.6", "--methods", "prune", "--no-verify")
    outcome = cli("compress", llama, *options, *SMALL)
    assert outcome.code == 0, outcome.err
    flat = " ".join(outcome.out.split())
    for words in ("Plan by layer", "predicted damage", "measured damage", "prune keep=", "layer by layer keep 0."):
        assert words in flat
    assert "Saved: the plan" in flat
    assert "Damage to the final answers: chosen layer by layer (keep 0." in (tmp_path / "out" / "README.md").read_text()


def test_a_methods_own_budget_shows_no_plan(cli: Call, llama: Path, tmp_path: Path) -> None:
    run = ("compress", llama, "--out", tmp_path / "out", "--recipe", "prune", "--budget", "keep=0.5", *SMALL)
    outcome = cli(*run, "--no-verify")
    assert outcome.code == 0, outcome.err
    assert "Plan by layer" not in outcome.out
    assert "Damage" not in (tmp_path / "out" / "README.md").read_text()


def test_from_python() -> None:
    result = ffsplit.compress(
        tiny("llama"), budget="keep=0.6", methods=["prune", "drop"], calibration=ids(), device="cpu"
    )
    assert result.plan.keep <= 0.6
    assert {ffn.method.method for ffn in result.plan.ffns if ffn.method} <= {"prune", "drop"}
    assert "Decided by measuring" in model_card(result.report, result.plan, "", "", stock=False)


def test_a_choice_in_words() -> None:
    assert in_words(None) == "as it is"
    assert in_words(load_recipe("prune", keep=0.25).method.model_dump(mode="json")) == "prune keep=0.25"
    mixed = {"method": "mixed-bits", "neurons": {"4": 48, "3": 16}}
    assert in_words(mixed) == "mixed-bits neurons=48x4+16x3"
