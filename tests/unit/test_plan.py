from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from ffsplit.errors import BudgetError, RecipeError
from ffsplit.families import find_ffns
from ffsplit.ffn.projections import LowRankSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.budgets import average_bits
from ffsplit.methods.registry import get_method, method_config
from ffsplit.pipeline.compress import shapes_of
from ffsplit.pipeline.plan import Plan, make_plan
from ffsplit.pipeline.recipe import load_recipe
from tests.tiny import TINY, tiny

RECIPE = {
    "method": {"method": "prune", "keep": 0.5},
    "overrides": [{"ffns": "0", "method": None}, {"ffns": "-1", "method": {"method": "quantize", "code_bits": 4}}],
}


def plan_of(family: str, recipe: Any, model: PreTrainedModel | None = None) -> Plan:
    model = model or tiny(family)
    found = find_ffns(model)
    return make_plan(found.sites, shapes_of(model, found), load_recipe(recipe).methods_for(len(found.sites)))


def test_a_plan_holds_every_ffn_in_order() -> None:
    plan = plan_of("bart", RECIPE)
    names = [site.name for site in find_ffns(tiny("bart")).sites]
    assert [ffn.name for ffn in plan.ffns] == names
    assert len(names) == 4
    assert [None if ffn.method is None else ffn.method.method for ffn in plan.ffns] == [
        None,
        "prune",
        "prune",
        "quantize",
    ]
    untouched = plan.ffns[0]
    assert untouched.spec.parameters == untouched.dense_shape.parameters
    assert untouched.spec.stored_bits(16) == 16 * untouched.dense_shape.parameters


def test_totals_are_those_of_all_ffns() -> None:
    plan = plan_of("bart", RECIPE)
    dense = sum(ffn.dense_shape.parameters for ffn in plan.ffns)
    assert plan.keep == sum(ffn.spec.parameters for ffn in plan.ffns) / dense
    weights = sum(ffn.dense_shape.weights for ffn in plan.ffns)
    assert plan.bits == sum(ffn.spec.stored_bits() for ffn in plan.ffns) / weights
    assert 0.5 < plan.keep < 1
    assert 4 < plan.bits < 16


def test_json_round_trip() -> None:
    plan = plan_of("llama-biased", {"method": {"method": "ffsplit", "bits": 5.0, "group": 16}})
    stored = plan.model_dump(mode="json")
    assert stored["ffns"][0]["method"]["rest"] is None
    assert stored["ffns"][0]["method"]["bits"] == 5.0
    again = Plan.model_validate(stored)
    assert [ffn.spec for ffn in again.ffns] == [ffn.spec for ffn in plan.ffns]
    assert (again.keep, again.bits) == (plan.keep, plan.bits)


def test_the_meta_device_is_enough() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = type(tiny("llama"))(tiny("llama").config)
    recipe = load_recipe("prune", keep=0.5)
    assert plan_of("llama", recipe, model) == plan_of("llama", recipe)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"method": "prune", "keep": 0.001}, r"fc1: keep leaves no neuron.*smallest reachable keep is 0\.0"),
        (
            {"method": "svd", "keep": 0.01},
            r"fc1: keep leaves no rank for matrices of d_ff=80; the smallest reachable keep is [\d.]+$",
        ),
        (
            {"method": "ffsplit", "keep": 0.3, "rest": "svd", "heavy": 20},
            r"beside 20 dense heavy neurons of d_ff=80.*or lower `heavy`",
        ),
        ({"method": "quantize", "bits": 1.5}, r"fc1: bits=1\.5 is out of reach.*smallest reachable is"),
        ({"method": "ffsplit", "bits": 1.5}, r"fc1: bits=1\.5 is out of reach"),
        ({"method": "ffsplit", "keep": 0.5, "heavy": 79}, r"fc1: keep=0\.5 leaves nothing for the linear map"),
        ({"method": "ffsplit", "keep": 0.9, "rest": "svd", "heavy": 500}, r"fc1: heavy=500.* is more than"),
    ],
)
def test_out_of_reach_names_the_layer(method: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        plan_of("opt", {"method": method})


def test_the_smallest_reachable_budget_is_reachable() -> None:
    for method in ("prune", "svd", "ffsplit", "block-dense", "monarch"):
        with pytest.raises(BudgetError) as refused:
            plan_of("opt", {"method": {"method": method, "keep": 0.001}})
        smallest = float(str(refused.value).split("smallest reachable keep is ")[1].split()[0])
        plan_of("opt", {"method": {"method": method, "keep": smallest + 1e-4}})
    for method in ("quantize", "ffsplit"):
        with pytest.raises(BudgetError) as refused:
            plan_of("opt", {"method": {"method": method, "bits": 1.0, "group": 16}})
        smallest = float(str(refused.value).split("smallest reachable is ")[1].split()[0])
        plan_of("opt", {"method": {"method": method, "bits": smallest + 1e-3, "group": 16}})


def test_nothing_to_do_is_refused() -> None:
    with pytest.raises(RecipeError, match="all 2 FFNs would stay as they are"):
        plan_of("llama", {"method": "ffsplit", "overrides": [{"ffns": "0-1", "method": None}]})


def test_indices_out_of_range_are_refused_before_any_work() -> None:
    with pytest.raises(RecipeError, match="index 2 is out of range; the model has 2 FFNs"):
        plan_of("llama", {"method": "ffsplit", "overrides": [{"ffns": "2", "method": None}]})


shapes = st.builds(
    FFNShape,
    d_model=st.integers(16, 96),
    d_ff=st.integers(16, 200),
    gated=st.booleans(),
    up_bias=st.booleans(),
    down_bias=st.booleans(),
)


KEEP_METHODS = ["prune", "svd", "whitened-svd", "ffsplit", "asvd", "block-dense", "monarch", "sparsify"]


@given(shape=shapes, keep=st.floats(0.05, 1.0), method=st.sampled_from(KEEP_METHODS))
def test_a_keep_budget_is_never_exceeded(shape: FFNShape, keep: float, method: str) -> None:
    try:
        spec = get_method(method).plan(shape, method_config({"method": method, "keep": keep}))
    except BudgetError:
        return
    assert spec.parameters <= keep * shape.parameters or keep == 1
    assert spec.neurons <= shape.d_ff


ALIGNED = [
    {"method": "prune"},
    {"method": "svd"},
    {"method": "ffsplit"},
    {"method": "ffsplit", "rest": "svd"},
    {"method": "ffsplit", "rest": "whitened", "heavy": 0.1},
]


@given(
    shape=shapes,
    keep=st.floats(0.05, 0.99),
    align=st.sampled_from([4, 8, 16]),
    values=st.sampled_from(ALIGNED),
)
def test_aligned_structures_are_on_the_grid_and_within_the_budget(
    shape: FFNShape, keep: float, align: int, values: dict[str, Any]
) -> None:
    shape = replace(shape, d_model=shape.d_model // 16 * 16, d_ff=shape.d_ff // 16 * 16)
    config = method_config({**values, "keep": keep, "align": align})
    try:
        spec = get_method(config.method).plan(shape, config)
    except BudgetError as refused:
        named = float(str(refused).split("keep is ")[1].split()[0].rstrip("."))
        assert named + 1e-4 > keep
        return
    assert spec.parameters <= keep * shape.parameters
    sizes = [branch.neurons for branch in spec.branches]
    sizes += [projection.rank for projection in spec.projections if isinstance(projection, LowRankSpec)]
    assert [size for size in sizes if size % align] == []


def test_what_a_rounded_rank_leaves_goes_to_heavy_neurons() -> None:
    """MPNet at 43.1 % of its encoder: 320 heavy neurons leave rank 166, of which 128 are a multiple."""
    shape = FFNShape(768, 3072, gated=False, up_bias=True, down_bias=True)
    values = {"method": "ffsplit", "rest": "svd", "heavy": 0.1, "keep": 0.353}
    spec = get_method("ffsplit").plan(shape, method_config({**values, "align": 64}))
    assert spec.describe() == "512 neurons, dense + 2,560 neurons, rank 128"
    one_step = shape.matrices * 64 * (768 - 128) / shape.parameters
    assert 0.353 - one_step < spec.parameters / shape.parameters <= 0.353


@pytest.mark.parametrize(
    "values", [{"bits": 5.0}, {"keep": 0.5, "rest": "monarch"}, {"keep": 0.5, "rest": "block-dense"}]
)
def test_align_is_refused_where_the_rest_has_its_own_grid(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="has its own grid"):
        method_config({"method": "ffsplit", "align": 8, **values})


@given(
    shape=shapes,
    bits=st.floats(2.0, 16.0),
    group=st.sampled_from([8, 16, 48, 64]),
    heavy=st.none() | st.floats(0, 0.999) | st.integers(1, 16),
    method=st.sampled_from(["quantize", "ffsplit"]),
)
def test_a_bits_budget_is_never_exceeded(
    shape: FFNShape, bits: float, group: int, heavy: float | None, method: str
) -> None:
    values: dict[str, Any] = {"method": method, "bits": bits, "group": group}
    if method == "ffsplit":
        values["heavy"] = heavy
    try:
        spec = get_method(method).plan(shape, method_config(values))
    except BudgetError:
        return
    assert spec.neurons == shape.d_ff
    if bits < 16:
        assert average_bits(spec, shape) <= bits


def test_more_heavy_neurons_than_there_are_cannot_come_from_rounding() -> None:
    """95% of 80 neurons, rounded to groups of 48, would be 96."""
    config = method_config({"method": "ffsplit", "bits": 12.0, "heavy": 0.95, "group": 48, "rest_bits": 2})
    spec = get_method("ffsplit").plan(FFNShape(32, 80, gated=True), config)
    assert [branch.neurons for branch in spec.branches] == [80]


def test_a_larger_budget_is_never_refused_where_a_smaller_is_not() -> None:
    shape = FFNShape(32, 80, gated=True)

    def reachable(keep: float) -> bool:
        try:
            get_method("ffsplit").plan(shape, method_config({"method": "ffsplit", "keep": keep}))
        except BudgetError:
            return False
        return True

    found = [reachable(step / 400) for step in range(1, 401)]
    assert found == sorted(found)
    assert not all(found)


def test_the_tiny_zoo_takes_a_common_recipe() -> None:
    for family in sorted({"llama", "bert", "t5", "vit", "gpt2"} & set(TINY)):
        assert 0.65 < plan_of(family, load_recipe("prune", keep=0.7)).keep <= 0.7
