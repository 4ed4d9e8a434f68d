"""Biases that may go: what is measured, what is decided, what is refused, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import ffsplit
from ffsplit.budget.bias_prune import BiasPruneConfig, bias_prune, check, removals, worth
from ffsplit.budget.registry import entry_config
from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import ModelError, RecipeError
from ffsplit.families import find_ffns
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.registry import get_method
from ffsplit.methods.unbias import UnbiasConfig
from ffsplit.pipeline.compress import evaluating
from tests.conformance.test_methods import ids, logits
from tests.conformance.test_planners import decided, dense, scene_of
from tests.tiny import tiny
from tests.unit.test_assemble import layer

BOTH, UP, DOWN = UnbiasConfig(up=True, down=True), UnbiasConfig(up=True), UnbiasConfig(down=True)
NONE = UnbiasConfig()
BIASED = FFNShape(d_model=8, d_ff=16, gated=True, up_bias=True, gate_bias=True, down_bias=True)


def config(**settings: Any) -> BiasPruneConfig:
    made = entry_config({"method": "bias-prune", **settings})
    assert isinstance(made, BiasPruneConfig)
    return made


def zeroed(data: LayerData, option: UnbiasConfig) -> Tensor:
    """What the dense FFN gives with zeros in place of the biases."""
    ffn, names = data.ffn, ("up_bias", "gate_bias") * option.up + ("down_bias",) * option.down
    changed = {name: torch.zeros_like(bias) for name, bias in ffn.tensors().items() if name in names}
    kept = {name: tensor for name, tensor in ffn.tensors().items() if name not in changed}
    return type(ffn)(act=ffn.act, **kept, **changed)(torch.cat(list(data.inputs)))


@pytest.mark.parametrize("gated", [True, False])
def test_errors_and_energies_by_plain_formulas(gated: bool) -> None:
    data = layer(gated=gated)
    options = [BOTH, UP, DOWN]
    found = worth(data, options)
    x, ffn = torch.cat(list(data.inputs)), data.ffn
    y = ffn(x)
    wanted = [float((zeroed(data, option) - y).norm() / y.norm()) for option in options]
    assert found.errors == pytest.approx(wanted, rel=1e-4)
    assert ffn.up_bias is not None
    assert ffn.down_bias is not None
    energies = {
        "up": float(ffn.up_bias.norm() / linear(x, ffn.up).norm(dim=1).mean()),
        "down": float(ffn.down_bias.norm() / linear(ffn.hidden(x), ffn.down).norm(dim=1).mean()),
    }
    if ffn.gate is not None and ffn.gate_bias is not None:
        energies["gate"] = float(ffn.gate_bias.norm() / linear(x, ffn.gate).norm(dim=1).mean())
    assert found.energy == pytest.approx(energies, rel=1e-4)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("option", [BOTH, UP, DOWN], ids=str)
def test_the_step_changes_nothing_but_the_biases(option: UnbiasConfig, gated: bool) -> None:
    data = layer(gated=gated)
    module = get_method("unbias").apply(data, option)
    assert module.spec == get_method("unbias").plan(FFNShape.of(data.ffn), option)
    torch.testing.assert_close(module(torch.cat(list(data.inputs))), zeroed(data, option))
    gone = data.ffn.d_ff * (1 + gated) * option.up + data.ffn.d_model * option.down
    assert module.spec.parameters == data.ffn.n_parameters - gone
    assert torch.equal(module.branches[0].up.dense(), data.ffn.up)
    assert torch.equal(module.branches[0].down.dense(), data.ffn.down)


def test_removing_nothing_is_the_dense_ffn() -> None:
    data = layer()
    module = get_method("unbias").apply(data, UnbiasConfig())
    assert module.spec.parameters == data.ffn.n_parameters


@pytest.mark.parametrize(
    ("shape", "settings", "wanted"),
    [
        (BIASED, {}, [BOTH, UP, DOWN]),
        (BIASED, {"up": False}, [DOWN]),
        (BIASED, {"down": False}, [UP]),
        (FFNShape(d_model=8, d_ff=4, gated=False, up_bias=True, down_bias=True), {}, [BOTH, DOWN, UP]),
        (FFNShape(d_model=8, d_ff=4, gated=True, gate_bias=True), {}, [UP]),
        (FFNShape(d_model=8, d_ff=4, gated=False, down_bias=True), {}, [DOWN]),
        (FFNShape(d_model=8, d_ff=4, gated=True), {}, []),
    ],
)
def test_the_most_parameters_come_first(shape: FFNShape, settings: dict[str, Any], wanted: list[UnbiasConfig]) -> None:
    assert removals(shape, config(**settings)) == wanted


@pytest.mark.parametrize(
    ("settings", "shapes", "message"),
    [
        ({}, [FFNShape(8, 16, gated=True)], "no bias of up/gate or down"),
        ({"down": False}, [FFNShape(8, 16, gated=True, down_bias=True)], "no bias of up/gate,"),
        ({"up": False}, [FFNShape(8, 16, gated=True, up_bias=True)], "no bias of down,"),
        ({}, [FFNShape(8, 16, gated=True), BIASED], None),
    ],
)
def test_a_model_without_such_biases_is_refused(
    settings: dict[str, Any], shapes: list[FFNShape], message: str | None
) -> None:
    if message is None:
        check(shapes, config(**settings))
        return
    with pytest.raises(ModelError, match=message):
        check(shapes, config(**settings))


@pytest.mark.parametrize("settings", [{"tolerance": 0}, {"up": False, "down": False}, {"gate": True}])
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(settings))):
        config(**settings)


def test_the_tolerance_decides_ffn_by_ffn() -> None:
    """One FFN without any biases that matter, one whose `down` has a large one, two that need all."""
    model = dense("llama-biased")
    sites = find_ffns(model).sites
    with torch.no_grad():
        for site, inner, outer in zip(sites, (1e-5, 1e-5, 30.0, 30.0), (1e-5, 1.0, 1.0, 1.0), strict=True):
            for path, scale in ((site.up, inner), (str(site.gate), inner), (site.down, outer)):
                model.get_submodule(path).bias.mul_(scale)
    scene = scene_of(model)
    with evaluating(model):
        assert bias_prune(scene, config()) == [BOTH, UP, NONE, NONE]
        assert list(scene.notes["bias_energy"]) == [site.name for site in sites]
        assert (
            scene.notes["bias_energy"][sites[0].name]["down"] < 0.01 < scene.notes["bias_energy"][sites[1].name]["down"]
        )
        assert bias_prune(scene, config(tolerance=100.0)) == [BOTH] * 4
        with pytest.raises(ModelError, match=r"tolerance=1e-09\. Smallest .*0: 0\.0000, .*2: \d\.\d+, 3: \d"):
            bias_prune(scene, config(tolerance=1e-9))


@pytest.mark.parametrize("family", ["llama-biased", "bert-mlm"])
def test_a_model_that_keeps_some_biases_is_a_plain_checkpoint(family: str, tmp_path: Path) -> None:
    result = decided(family, "bias-prune", {"tolerance": 0.1})
    assert {ffn.method for ffn in result.plan.ffns} == {UP, NONE}
    saved = ffsplit.save(result, tmp_path / "out")
    assert saved.kind == "stock"
    loaded = type(result.model).from_pretrained(saved.directory).eval()
    torch.testing.assert_close(logits(loaded), logits(result.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama-biased", "gpt2", "opt", "phi"])
def test_without_its_biases_the_model_is_one_with_zeros(family: str, tmp_path: Path) -> None:
    """Every FFN loses all: as a model whose biases are zero, also when written as a plain checkpoint."""
    model = tiny(family)
    recipe = {"method": {"method": "bias-prune", "tolerance": 100.0}}
    result = ffsplit.compress(model, recipe=recipe, calibration=ids(), device="cpu")
    sums = [module for module in result.model.modules() if isinstance(module, SumFFN)]
    assert [ffn.method for ffn in result.plan.ffns] == [BOTH] * len(sums)
    assert sums
    assert not any(module.spec.bias_parameters for module in sums)
    reference = tiny(family)
    for site in find_ffns(reference).sites:
        for path in site.projections:
            torch.nn.init.zeros_(reference.get_submodule(path).bias)
    torch.testing.assert_close(logits(result.model), logits(reference), rtol=1e-4, atol=1e-5)
    saved = ffsplit.save(result, tmp_path / "out")
    assert saved.kind == "stock"
    loaded = type(reference).from_pretrained(saved.directory).eval()
    torch.testing.assert_close(logits(loaded), logits(reference), rtol=1e-4, atol=1e-5)
