"""Neurons without activations: the collapsed map is exact, the right neurons stay, the budget is met."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ffsplit.errors import BudgetError, ModelError, RecipeError
from ffsplit.ffn.projections import DenseSpec, LowRankSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.heavy_map import heavy_and_map
from ffsplit.methods.registry import get_method, method_config
from tests.unit.test_assemble import D_FF, D_MODEL, layer, output_error


def fit(name: str, gated: bool = True, biased: bool = True, **settings: Any) -> tuple[SumFFN, float]:
    data = layer(gated=gated, biased=biased, tokens=400)
    config = method_config({"method": name, **settings})
    module = get_method(name).apply(data, config)
    assert module.spec == get_method(name).plan(FFNShape.of(data.ffn), config)
    return module, output_error(data, module)


@torch.no_grad()
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("refit", [True, False])
def test_neurons_on_one_side_of_their_bend_collapse_exactly(biased: bool, refit: bool) -> None:
    """A ReLU neuron that is always on is linear, one that is always off is zero; the others stay."""
    data = layer(gated=False, biased=True, tokens=400)
    object.__setattr__(data.ffn, "act", nn.ReLU())
    data.ffn.up_bias[:8] = 100.0
    data.ffn.up_bias[8:16] = -100.0
    if not biased:
        object.__setattr__(data.ffn, "down_bias", None)
    config = method_config({"method": "linearise", "keep": 0.7, "heavy": 8, "refit": refit})
    module = get_method("linearise").apply(data, config)
    assert isinstance(module.spec.linear, DenseSpec)
    kept = {tuple(row) for row in module.branches[0].up.weight.tolist()}
    assert kept == {tuple(row) for row in data.ffn.up[16:].tolist()}
    assert output_error(data, module) < 1e-5


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_refit_and_joint_choice_help(gated: bool, biased: bool) -> None:
    errors = [
        fit("linearise", gated, biased, keep=0.7, heavy=10, **settings)[1]
        for settings in ({"refit": False}, {}, {"score": "greedy_obs"})
    ]
    assert errors[0] > errors[1] > errors[2]


def test_no_heavy_neuron_is_the_best_affine_map() -> None:
    module, error = fit("linearise", keep=0.5, heavy=0, ridge=0.0)
    data = layer(tokens=400)
    x = torch.cat(list(data.inputs)).double()
    y = data.ffn(x.float()).double()
    columns = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)
    left = y - columns @ torch.linalg.lstsq(columns, y).solution
    assert not module.branches
    assert error == pytest.approx(float(left.norm() / y.norm()), rel=1e-4)


def test_the_map_is_dense_where_the_budget_reaches_and_low_rank_elsewhere() -> None:
    shape = FFNShape(D_MODEL, D_FF, gated=False)
    wide = heavy_and_map(shape, 0.9, 4, bias=True)
    thin = heavy_and_map(shape, 0.3, 4, bias=True)
    assert wide.linear == DenseSpec(shape=(D_MODEL, D_MODEL))
    assert isinstance(thin.linear, LowRankSpec)
    assert thin.parameters <= 0.3 * shape.parameters < thin.parameters + 2 * D_MODEL


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("down_bias", [True, False])
@pytest.mark.parametrize("heavy", [None, 0.2, 5, 0])
@pytest.mark.parametrize("align", [1, 8])
def test_the_smallest_keep_that_an_error_names_works(
    bias: bool, down_bias: bool, heavy: float | None, align: int
) -> None:
    shape = FFNShape(16, 40, gated=True, down_bias=down_bias)
    with pytest.raises(BudgetError, match=r"smallest\s+reachable keep is") as refused:
        heavy_and_map(shape, 0.001, heavy, bias=bias, align=align)
    named = float(str(refused.value).split("keep is ")[1].split()[0].rstrip("."))
    spec = heavy_and_map(shape, named + 6e-5, heavy, bias=bias, align=align)
    assert spec.neurons % align == 0
    assert spec.parameters <= (named + 6e-5) * shape.parameters
    assert spec.bias == bias


def test_a_budget_is_used_up() -> None:
    shape = FFNShape(64, 256, gated=True, down_bias=False)
    for keep in (0.2, 0.5, 0.8):
        used = heavy_and_map(shape, keep, None, bias=True).parameters / shape.parameters
        assert keep - 0.01 < used <= keep


@pytest.mark.parametrize(
    "values", [{"keep": 0.5, "heavy": 2.5}, {"keep": 0.5, "heavy": -1}, {"keep": 0.5, "score": "x"}]
)
def test_settings_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        method_config({"method": "linearise", **values})


@pytest.mark.parametrize("biased", [True, False])
def test_bilinear_neurons_are_their_lines(biased: bool) -> None:
    module, error = fit("bilinear", biased=biased, light=0.5)
    heavy, light = module.branches
    assert (heavy.activated, light.activated) == (True, False)
    assert light.spec.gate_bias
    assert module.spec.parameters == sum(p.numel() for p in module.parameters())
    x = torch.randn(7, D_MODEL)
    g = x @ light.gate.weight.T + light.gate_bias
    u = x @ light.up.weight.T + (light.up_bias if biased else 0)
    torch.testing.assert_close(light.hidden(x), g * u)
    assert error < fit("bilinear", biased=biased, light=0.5, refit=False)[1]
    assert error < fit("bilinear", biased=biased, light=1.0)[1]


def test_bilinear_with_an_activation_that_is_a_line_is_exact() -> None:
    data = layer()
    object.__setattr__(data.ffn, "act", nn.Identity())
    config = method_config({"method": "bilinear", "light": 1.0, "refit": False})
    assert output_error(data, get_method("bilinear").apply(data, config)) < 1e-5


def test_branches_without_activation_are_no_dense_ffn() -> None:
    module, _ = fit("bilinear", light=1.0)
    assert not module.spec.is_one_dense_branch
    with pytest.raises(ModelError, match="without an activation"):
        module.to_weights()
    empty = SumFFN.empty(module.spec, nn.GELU(), torch.float32, "cpu")
    empty.load_state_dict(module.state_dict())
    x = torch.randn(3, D_MODEL)
    assert torch.equal(empty(x), module(x))
    assert SumSpec.model_validate_json(module.spec.model_dump_json()) == module.spec
    assert "no activation" in module.spec.describe()


def test_bilinear_points_plain_ffns_to_linearise() -> None:
    with pytest.raises(RecipeError, match="linearise"):
        get_method("bilinear").plan(FFNShape(8, 16, gated=False), method_config({"method": "bilinear"}))
