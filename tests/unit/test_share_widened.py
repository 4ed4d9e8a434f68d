"""A shared FFN that is wider than each of the layers that use it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import ffsplit
from ffsplit.budget.registry import entry_config
from ffsplit.calibrate.cache import Activations, TensorCache
from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import ModelError, RecipeError
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods import shared as shared_module
from ffsplit.methods.widened import fit_wide, place_of, wider
from tests.conformance.test_methods import FAMILIES, logits, sums
from tests.unit.test_share import deep, errors, relatives, shared

ALL: dict[str, Any] = {"tie": "all", "widen": True}


def weights(seed: int, *, gated: bool, d_ff: int = 12) -> FFNWeights:
    torch.manual_seed(seed)
    bias = None if gated else torch.randn(8)
    hidden_bias = None if gated else torch.randn(d_ff)
    gate = torch.randn(d_ff, 8) if gated else None
    return FFNWeights(torch.randn(d_ff, 8), torch.randn(8, d_ff), torch.nn.GELU(), gate, hidden_bias, None, bias)


def data_of(ffn: FFNWeights, seed: int) -> LayerData:
    inputs = Activations(TensorCache(), "in-")
    for chunk in torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(seed)):
        inputs.append(chunk)
    return LayerData(ffn, inputs)


@pytest.mark.parametrize("gated", [True, False])
def test_down_is_the_least_squares_solution_over_all_places(gated: bool) -> None:
    """The same numbers as torch.linalg.lstsq on the stacked activations of both layers, a bias of each beside them."""
    base, other = weights(0, gated=gated), weights(1, gated=gated)
    own, member = place_of(base, data_of(base, 2), "activations"), place_of(base, data_of(other, 3), "activations")
    wide = wider(base, [member], 4)
    fitted = fit_wide(wide, [own, member], ridge=0.0)
    rows, targets = [], []
    for number, place in enumerate((own, member)):
        used = wide
        if not gated:  # the neurons keep the biases of the layer that they work in
            assert place.ffn.up_bias is not None
            assert wide.up_bias is not None
            used = replace(wide, up_bias=torch.cat([place.ffn.up_bias, wide.up_bias[12:]]))
        x = torch.cat(list(place.data.chunks()))
        constant = torch.zeros(len(x), 2)
        constant[:, number] = 1.0
        rows.append(torch.cat([used.hidden(x), constant] if not gated else [used.hidden(x)], dim=1).double())
        targets.append((place.data.ffn(x) - (0 if gated else place.data.ffn.down_bias)).double())
    expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution.T
    torch.testing.assert_close(fitted.branches[0].down.dense().double(), expected[:, :16], rtol=1e-3, atol=1e-4)
    if not gated:
        assert fitted.bias is not None
        assert base.down_bias is not None
        torch.testing.assert_close(fitted.bias - base.down_bias, expected[:, 16].float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("match", ["activations", "weights"])
def test_the_neurons_without_a_counterpart_are_appended(match: Any) -> None:
    base, fresh = weights(0, gated=True), weights(1, gated=True)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    changed = base.take(order)
    new = torch.tensor([2, 7, 9])
    for name in ("up", "gate"):
        getattr(changed, name)[new] = getattr(fresh, name)[new]
    changed.down[:, new] = fresh.down[:, new]
    wide = wider(base, [place_of(base, data_of(changed, 5), match)], 3)
    found = {tuple(row.tolist()) for row in wide.gate[12:]} if wide.gate is not None else set()
    assert found == {tuple(row.tolist()) for row in changed.gate[new]} if changed.gate is not None else False
    x = torch.randn(20, 8)
    torch.testing.assert_close(wide(x), base(x))


@pytest.mark.parametrize("tie", ["inner", "all"])
def test_more_neurons_less_error(tie: str) -> None:
    def total(keep: float) -> float:
        return sum(error**2 for error in errors(shared("llama", {"widen": True, "tie": tie, "keep": keep})))

    found = [total(keep) for keep in (0.7, 0.85, 0.99)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.9 * found[0]


def test_layers_that_share_all_neurons_lose_nothing() -> None:
    result = shared(relatives(0.0), {**ALL, "keep": 0.6})
    assert max(errors(result)) < 1e-3
    torch.testing.assert_close(logits(result.model), logits(relatives(0.0)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_budget_is_used_and_the_checkpoint_comes_back(family: str, tmp_path: Path) -> None:
    result = shared(family, ALL)
    assert 0.97 * 0.8 <= result.plan.keep <= 0.8
    widths = {branch.up.spec.shape[0] for module in sums(result.model) for branch in module.branches}
    assert len(widths) == 1
    assert widths.pop() > result.plan.ffns[0].dense_shape.d_ff
    before = logits(result.model)
    saved = ffsplit.save(result, tmp_path / "out")
    loaded = type(result.model).from_pretrained(saved.directory).eval()
    assert torch.equal(logits(loaded), before)
    with pytest.raises(ModelError, match="of several FFNs"):
        ffsplit.decompress(loaded)


def test_a_group_of_three_in_half_precision_and_after_a_kill(tmp_path: Path) -> None:
    deep().save_pretrained(tmp_path / "dense")
    method = {**ALL, "group": 3, "keep": 0.7, "merge": "average"}
    runs = []
    for _ in range(2):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
        result = shared(model, method, journal=tmp_path / "journal")
        runs.append(logits(result.model))
    assert torch.equal(*runs)
    assert [ffn.method.extra > 0 for ffn in result.plan.ffns if ffn.method] == [True] * 5


def test_inputs_ahead_are_those_of_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the owner is fitted, the second layer's inputs are what the dense model gives."""
    seen: list[torch.Tensor] = []
    model = relatives(0.3)
    model.model.layers[1].mlp.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0]))
    logits(model)
    taken: list[torch.Tensor] = []

    def watched(base: FFNWeights, data: LayerData, match: Any) -> Any:
        taken.extend(data.chunks())
        return place_of(base, data, match)

    monkeypatch.setattr(shared_module, "place_of", watched)
    shared(model, ALL)
    torch.testing.assert_close(taken[0], seen[0])


def test_widening_needs_counterparts_and_text() -> None:
    with pytest.raises(RecipeError, match="widen needs match"):
        entry_config({"method": "share", "keep": 0.8, "widen": True, "match": "none"})
    assert entry_config({"method": "share", "keep": 0.8, "tie": "all", "match": "weights", "widen": True}).needs_data
