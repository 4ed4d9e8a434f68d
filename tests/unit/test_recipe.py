from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import RecipeError
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN, dense_branch
from ffsplit.methods import registry
from ffsplit.methods.budgets import dense_branch_spec, sum_spec
from ffsplit.methods.registry import MethodConfig, get_method, method, methods
from ffsplit.pipeline.recipe import PRESETS, Recipe, load_recipe, parse_indices

PRUNE = {"method": {"method": "prune", "keep": 0.5}}


def values(recipe: Recipe) -> dict[str, Any]:
    return recipe.method.model_dump(mode="json")


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_by_name(name: str) -> None:
    if "bits" in get_method(name).budget:
        assert values(load_recipe(name))["bits"] == 4.0
        assert values(load_recipe(name, bits=3.5))["bits"] == 3.5
    elif get_method(name).budget and not get_method(name).config.budget_is_optional:
        with pytest.raises(RecipeError, match=rf"method {name} needs a budget: {get_method(name).budget[0]}"):
            load_recipe(name)
    if not get_method(name).budget:
        with pytest.raises(RecipeError, match=rf"method {name} takes no keep; it has no budget"):
            load_recipe(name, keep=0.5)
    if "keep" in get_method(name).budget:
        assert values(load_recipe(name, keep=0.5))["keep"] == 0.5
        assert values(load_recipe(name, keep=0.5)).get("bits") is None


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets(name: str) -> None:
    preset = PRESETS[name]
    budgets = {"keep", "bits"} & preset["method"].keys()
    chosen = load_recipe(name) if budgets else load_recipe(name, keep=0.5)
    dumped = chosen.model_dump(mode="json")
    assert dumped["method"] | preset["method"] == dumped["method"]
    assert dumped | {key: value for key, value in preset.items() if key != "method"} == dumped
    budget = next(iter(budgets), "keep")
    changed = load_recipe(name, **{budget: 0.9 if budget == "keep" else 5.0})  # type: ignore[arg-type]
    assert values(changed) | {budget: values(chosen)[budget]} == values(chosen)
    assert (changed.drift, changed.seed) == (chosen.drift, chosen.seed)


def test_defaults() -> None:
    recipe = load_recipe()
    assert (recipe.method.method, recipe.calibration.source, recipe.propagate, recipe.drift, recipe.seed) == (
        "ffsplit",
        "builtin",
        True,
        0.0,
        0,
    )


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_files(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"recipe{suffix}"
    file.write_text('{"method": {"method": "prune", "keep": 0.5}, "seed": 3, "calibration": {"samples": 5}}')
    assert (
        load_recipe(file) == load_recipe(str(file)) == load_recipe({**PRUNE, "seed": 3, "calibration": {"samples": 5}})
    )
    changed = load_recipe(file, keep=0.25, seed=4, calibration={"seq_len": 16})
    assert (values(changed)["keep"], changed.seed) == (0.25, 4)
    assert (changed.calibration.samples, changed.calibration.seq_len) == (5, 16)


def test_a_dictionary_is_not_changed() -> None:
    given = {"method": {"method": "prune", "keep": 0.5}, "calibration": {"samples": 3}}
    load_recipe(given, keep=0.75, seed=1, calibration={"samples": 9})
    assert given == {"method": {"method": "prune", "keep": 0.5}, "calibration": {"samples": 3}}


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("prun", {}, r"unknown recipe 'prun'; did you mean 'prune'\?"),
        ("ffsplit-paper-lowrnk", {}, "did you mean 'ffsplit-paper-lowrank'"),
        ("qqqqq", {}, r"unknown recipe .qqqqq.\. Known: .*\bffsplit, .*\bprune, "),
        ("nowhere.yaml", {}, "recipe file nowhere.yaml does not exist"),
        ({"method": "quantise"}, {}, "unknown method 'quantise'; did you mean 'quantize'"),
        ({"method": {"method": "prune", "kep": 0.5}}, {"keep": 0.5}, "unknown key 'kep'; did you mean 'keep'"),
        ({**PRUNE, "sed": 3}, {}, r"unknown key 'sed'; did you mean 'seed'\?"),
        (
            {**PRUNE, "calibration": {"sampels": 3}},
            {},
            r"unknown key 'calibration.sampels'; did you mean 'samples'\? Allowed: source, field",
        ),
        (
            {**PRUNE, "overrides": [{"ffns": "0", "metod": None}]},
            {},
            r"unknown key 'overrides.0.metod'; did you mean 'method'\? Allowed: ffns, method",
        ),
        ({**PRUNE, "overrides": [{"ffns": "0"}]}, {}, r"overrides\.0\.method is required"),
        ({**PRUNE, "overrides": [{"ffns": "0", "method": "nothing"}]}, {}, "unknown method 'nothing'"),
        ({**PRUNE, "drift": 1.5}, {}, "drift: .*less than or equal to 1"),
        ({**PRUNE, "drift": -0.5}, {}, "drift: .*greater than or equal to 0"),
        ({**PRUNE, "version": 2}, {}, "version"),
        ({**PRUNE, "calibration": {"samples": 0}}, {}, "calibration.samples"),
        ({**PRUNE, "calibration": "builtin"}, {"calibration": {"samples": 3}}, "calibration must be a mapping"),
        ({**PRUNE, "calibration": "builtin"}, {}, "calibration"),
        ({"keep": 0.5}, {}, "method is required"),
        ({"method": 3}, {}, "a method is a name or a mapping"),
        ({"method": {"keep": 0.5}}, {}, "unknown method"),
        ("ffsplit", {"keep": 0.5, "bits": 4.0}, "one budget, keep or bits, not both"),
        ("quantize", {"keep": 0.5}, "method quantize takes no keep; its budget is bits"),
        ("prune", {"bits": 4.0}, "method prune takes no bits; its budget is keep"),
        ("prune", {"keep": 1.5}, "keep must be above 0 and at most 1"),
        ("prune", {"keep": 0.0}, "keep must be above 0"),
        ("prune", {"keep": float("nan")}, "keep"),
        ("ffsplit", {"bits": 17.0}, "bits"),
        ({"method": {"method": "ffsplit", "keep": 0.5, "bits": 4}}, {}, "exactly one budget"),
        ({"method": {"method": "ffsplit", "keep": 0.5, "rest": "gptq"}}, {}, "rest='gptq' goes with bits"),
        ({"method": {"method": "ffsplit", "bits": 4, "rest": "svd"}}, {}, "rest='svd' goes with keep"),
        ({"method": {"method": "ffsplit", "keep": 0.5, "heavy_bits": 8}}, {}, "heavy_bits below 16 needs the bits"),
        ({"method": {"method": "ffsplit", "bits": 4, "heavy_bits": 12}}, {}, "heavy_bits is 2 to 8"),
        ({"method": {"method": "ffsplit", "bits": 4, "heavy": 2.5}}, {}, "share below 1 or a whole number"),
        ({"method": {"method": "ffsplit", "keep": 0.5, "refit": False}}, {}, "it needs refit: true"),
        ({"method": {"method": "quantize", "bits": 4, "code_bits": 4}}, {}, "exactly one of bits and code_bits"),
        ({"method": {"method": "quantize", "bits": 4, "rounding": "rtn", "refit": True}}, {}, "refit needs rounding"),
    ],
)
def test_refused(recipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, **options)


@pytest.mark.parametrize("content", ["[1, 2]", "just words", "a: [", "", "\xff\xfe\x00"])
def test_files_that_are_no_recipe(tmp_path: Path, content: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(RecipeError, match=r"recipe\.yaml (is not valid YAML|must hold a mapping)"):
        load_recipe(file)


FULL_RECIPES: list[dict[str, Any]] = [
    PRUNE,
    {"method": "ffsplit"},
    {"method": {"method": "quantize", "code_bits": 4}},
    {"method": {"method": "quantize", "code_bits": 4, "rounding": "rtn"}},
    {"method": {"method": "quantize", "bits": 4, "rounding": "rtn", "refit": False}},
    PRESETS["ffsplit-paper-quant"],
    PRESETS["ffsplit-paper-lowrank"],
    PRESETS["ffsplit-best"],
    {
        "method": {"method": "whitened-svd", "keep": 0.5, "refit": False},
        "overrides": [
            {"ffns": "0-1,-1", "method": None},
            {"ffns": 2, "method": {"method": "ffsplit", "bits": 4.0, "rest": "rtn"}},
            {"ffns": "-1", "method": {"method": "quantize", "code_bits": 8, "rounding": "rtn"}},
        ],
        "drift": 0.5,
        "seed": 7,
        "propagate": False,
        "calibration": {"source": "some/file.txt", "field": "text", "samples": 4, "seq_len": 32},
    },
]


@pytest.mark.parametrize("given", FULL_RECIPES)
def test_round_trip(given: dict[str, Any]) -> None:
    recipe = load_recipe(given)
    stored = yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(stored) == recipe
    assert load_recipe(recipe) == recipe
    assert load_recipe(recipe, seed=99).seed == 99
    assert Recipe.model_validate(recipe.model_dump()) == recipe


@pytest.mark.parametrize(
    ("method", "budget", "gone"),
    [
        ({"method": "drop-ffns", "count": 2}, {"keep": 0.5}, "count"),
        ({"method": "finercut", "count": 2, "replacement": "low-rank", "rank": 4}, {"budget": "keep=0.5"}, "count"),
        ({"method": "drop", "rank": 4}, {"keep": 0.5}, "rank"),
        ({"method": "prune", "width": 100}, {"keep": 0.5}, "width"),
        ({"method": "quantize", "code_bits": 4}, {"bits": 3.5}, "code_bits"),
    ],
    ids=lambda value: value.get("method") if isinstance(value, dict) else None,
)
def test_a_budget_replaces_what_says_the_same_in_another_unit(
    method: dict[str, Any], budget: dict[str, Any], gone: str
) -> None:
    kept = {name: value for name, value in method.items() if name != gone}
    for start in ({"method": method}, load_recipe({"method": method})):
        found = load_recipe(start, **budget).method
        assert getattr(found, gone) is None
        assert {name: getattr(found, name) for name in kept} == kept


def test_a_budget_that_contradicts_a_setting_is_refused() -> None:
    with pytest.raises(RecipeError, match="keep goes with replacement='low-rank'"):
        load_recipe({"method": {"method": "drop", "replacement": "mean"}}, keep=0.5)
    with pytest.raises(RecipeError, match="target='attention' drops none; give count"):
        load_recipe({"method": {"method": "drop-ffns", "count": 2, "target": "attention"}}, keep=0.5)


def test_a_recipe_object_keeps_what_nobody_asked_for_a_default() -> None:
    recipe = load_recipe(Recipe.model_validate(PRUNE), calibration={"samples": 3})
    assert recipe.calibration.model_fields_set == {"samples"}


def test_a_method_that_fits_no_data_says_so() -> None:
    needs = {
        "svd": False,
        "whitened-svd": True,
        "prune": True,
    }
    assert {name: load_recipe(name, keep=0.5).method.needs_data for name in needs} == needs
    assert not load_recipe({"method": {"method": "quantize", "code_bits": 4, "rounding": "rtn"}}).method.needs_data
    assert not load_recipe(
        {"method": {"method": "prune", "keep": 0.5, "score": "magnitude", "refit": False}}
    ).method.needs_data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", [0]),
        ("-1", [4]),
        ("0-2", [0, 1, 2]),
        ("0-2,4", [0, 1, 2, 4]),
        (" 1 , 3 - 4 ", [1, 3, 4]),
        ("-5", [0]),
        ("2-2", [2]),
        ("-1,-2", [4, 3]),
        ("0-4", [0, 1, 2, 3, 4]),
    ],
)
def test_indices(text: str, expected: list[int]) -> None:
    assert parse_indices(text, 5) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", r"index 5 is out of range; the model has 5 FFNs \(0 to 4\)"),
        ("-6", "index -6 is out of range"),
        ("3-7", "index 7 is out of range"),
        ("0-999999999999", "index 999999999999 is out of range"),
        ("3-1", "the range '3-1' is empty"),
        ("0--1", "the range '0--1' is empty"),
        ("", "'' is neither an index nor a range"),
        ("1,", "'' is neither"),
        ("a", "'a' is neither"),
        ("1-", "'1-' is neither"),
        ("-3--1", "'-3--1' is neither"),
        ("1.5", "'1.5' is neither"),
    ],
)
def test_indices_that_are_none(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_indices(text, 5)


def test_the_last_override_wins() -> None:
    recipe = load_recipe(
        {
            **PRUNE,
            "overrides": [{"ffns": "0-2", "method": None}, {"ffns": "-3", "method": {"method": "svd", "keep": 0.5}}],
        }
    )
    chosen = recipe.methods_for(4)
    assert [None if config is None else config.method for config in chosen] == [None, "svd", None, "prune"]


class StubConfig(MethodConfig):
    method: Literal["stub"] = "stub"
    bits: float = 4.0
    colour: str = "red"


@pytest.fixture
def stub() -> Iterator[str]:
    def structure(shape: FFNShape, config: StubConfig) -> SumSpec:
        return sum_spec(shape, [dense_branch_spec(shape, shape.d_ff)], bias=shape.down_bias)

    @method("stub", summary="s", paper="p", budget=("bits",), as_sum="all", config=StubConfig, structure=structure)
    def fit(data: LayerData, config: StubConfig) -> SumFFN:
        return SumFFN(data.ffn.d_model, [dense_branch(data.ffn)], bias=data.ffn.down_bias)

    yield "stub"
    registry._METHODS.pop("stub", None)


def test_a_registered_method_is_found(stub: str) -> None:
    assert get_method(stub).summary == "s"
    assert list(methods()) == sorted(methods())
    assert load_recipe(stub).method == StubConfig()
    assert load_recipe({"method": {"method": stub, "colour": "blue"}}, bits=2.0).method == StubConfig(
        bits=2.0, colour="blue"
    )
    with pytest.raises(RecipeError, match="unknown key 'color'; did you mean 'colour'"):
        load_recipe({"method": {"method": stub, "color": "blue"}})
    with pytest.raises(RecipeError, match="did you mean 'stub'"):
        get_method("stubb")
    with pytest.raises(ValueError, match="stub is registered twice"):
        method("stub", summary="", paper="", budget=(), as_sum="", config=StubConfig, structure=lambda *_: None)(
            lambda *_: None  # type: ignore[arg-type, return-value]
        )


def test_a_method_that_was_taken_out_is_unknown() -> None:
    with pytest.raises(RecipeError, match=r"unknown method 'stub'.* Known: .*\bffsplit, "):
        get_method("stub")
