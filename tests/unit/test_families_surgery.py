"""Reading FFN weights, replacing FFNs, putting them back, and writing other widths."""

from __future__ import annotations

from dataclasses import replace as change
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffsplit.errors import ModelError
from ffsplit.families import FFNSite, Tripwire, find_ffns, originals, read, replace, restore, verify, write
from ffsplit.families.forward import evaluating
from ffsplit.families.inputs import candidate_inputs
from ffsplit.ffn.weights import FFNWeights
from tests.tiny import REFUSED, TINY, tiny

WORKING = [name for name in TINY if name not in REFUSED]


class Reference(nn.Module):
    """The dense FFN itself as a replacement."""

    def __init__(self, weights: FFNWeights) -> None:
        super().__init__()
        self.weights = weights
        self.own = nn.Parameter(weights.up.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x)


def outputs(model: PreTrainedModel) -> Tensor:
    for kwargs in candidate_inputs(model):
        try:
            with evaluating(model):
                out: Tensor = model(**kwargs)[0]
                return out.clone()
        except ValueError:  # the image of a multimodal model without image tokens
            continue
    raise AssertionError("no inputs fit")


def replace_all(model: PreTrainedModel) -> tuple[tuple[FFNSite, ...], dict[str, nn.Module]]:
    sites = find_ffns(model).sites
    taken: dict[str, nn.Module] = {}
    for site in sites:
        taken |= replace(model, site, Reference(read(model, site)))
    return sites, taken


@pytest.mark.parametrize("name", WORKING)
def test_the_same_ffn_in_its_place_changes_nothing_and_restores(name: str) -> None:
    model = tiny(name)
    before, keys = outputs(model), list(model.state_dict())
    sites, taken = replace_all(model)
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-5)
    for site in sites:
        assert isinstance(model.get_submodule(site.name), Reference)
        assert isinstance(model.get_submodule(site.down), Tripwire)
        assert model.state_dict()[f"{site.down}.weight"].shape == (site.d_model, 0)
    restore(model, taken)
    assert list(model.state_dict()) == keys
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-mlm", "opt", "bloom", "t5", "phi3", "esm", "albert"])
def test_the_replacement_is_what_computes(name: str) -> None:
    model = tiny(name)
    before = outputs(model)
    for site in find_ffns(model).sites:
        weights = read(model, site)
        replace(model, site, Reference(change(weights, down=-2 * weights.down)))
    assert not torch.allclose(outputs(model), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "bert-mlm", "opt", "esm", "t5", "falcon"])
def test_stock_transformers_refuses_to_load_a_replaced_model(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    cls = type(model)
    replace_all(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", WORKING)
def test_a_narrower_ffn_is_written_into_the_stock_layout(name: str) -> None:
    model = tiny(name)
    sites = find_ffns(model).sites
    wanted = {site.name: read(model, site).take(torch.arange(site.d_ff - 1, 7, -1)) for site in sites}
    layout = {key: type(module) for key, module in model.named_modules()}
    for site in sites:
        write(model, site, wanted[site.name])
    narrow = find_ffns(model).sites
    assert [site.d_ff for site in narrow] == [site.d_ff - 8 for site in sites]
    assert {key: type(module) for key, module in model.named_modules()} == layout
    verify(model, narrow)
    for site in narrow:
        for field, tensor in wanted[site.name].tensors().items():
            assert torch.equal(read(model, site).tensors()[field], tensor)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "apertus", "bert"])
def test_a_skeleton_gives_a_replaced_model_its_layout_back(name: str) -> None:
    model, sites = tiny(name), find_ffns(tiny(name)).sites
    dense = {site.name: read(model, site) for site in sites}
    before = outputs(model)
    replace_all(model)
    with torch.device("meta"):
        skeleton = TINY[name]()
    for site in sites:
        write(skeleton, site, dense[site.name])
        restore(model, originals(skeleton, site))
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(outputs(model), before)


def test_write_keeps_dtype_and_fills_missing_biases() -> None:
    model = tiny("gpt2").to(torch.bfloat16)
    site = find_ffns(model).sites[0]
    weights = read(model, site).map(lambda tensor: tensor.float())
    write(model, site, change(weights, up_bias=None))
    up = model.get_submodule(site.up)
    assert up.weight.dtype == up.bias.dtype == torch.bfloat16
    assert up.bias.abs().max() == 0


@pytest.mark.parametrize(("name", "bias"), [("llama", "down_bias"), ("phi3", "up_bias"), ("llama", "gate_bias")])
def test_a_bias_without_a_place_is_refused_and_nothing_is_written(name: str, bias: str) -> None:
    model = tiny(name)
    site = find_ffns(model).sites[0]
    weights = read(model, site)
    size = site.d_model if bias == "down_bias" else site.d_ff
    before = weights.map(torch.clone)
    with pytest.raises(ModelError, match="no place for it"):
        write(model, site, change(weights.map(torch.zeros_like), **{bias: torch.ones(size)}))
    assert all(torch.equal(read(model, site).tensors()[key], value) for key, value in before.tensors().items())


def test_weights_of_another_kind_are_refused() -> None:
    model, other = tiny("llama"), tiny("gpt2")
    plain = read(other, find_ffns(other).sites[0])
    with pytest.raises(ModelError, match="do not fit"):
        write(model, find_ffns(model).sites[0], plain)


def test_a_replaced_ffn_cannot_be_read() -> None:
    model = tiny("opt")
    sites, _ = replace_all(model)
    with pytest.raises(ModelError, match="Reference, not a dense projection"):
        read(model, sites[0])
    with pytest.raises(ModelError, match="has no module"):
        read(model, change(sites[0], up="model.nowhere"))


def test_a_replacement_with_something_where_the_tripwire_belongs_is_refused() -> None:
    model = tiny("llama")
    site = find_ffns(model).sites[0]
    module = nn.Module()
    module.down_proj = nn.Identity()
    with pytest.raises(ModelError, match="'down_proj' of its own"):
        replace(model, site, module)
    assert read(model, site).d_ff == 80


def test_an_ffn_that_layers_share_is_replaced_under_all_of_its_names() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    before = outputs(model)
    ffns = find_ffns(model)
    (site,) = ffns.sites
    assert ffns.calls == {site.name: 2}
    replace(model, site, Reference(read(model, site)))
    assert model.model.layers[1].mlp is model.model.layers[0].mlp
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-5)


def test_layers_that_share_an_activation_module_are_replaced_one_by_one() -> None:
    model = tiny("opt")
    layers = model.model.decoder.layers
    layers[1].activation_fn = layers[0].activation_fn
    before = outputs(model)
    first, second = find_ffns(model).sites
    assert (first.act, second.act) == tuple(f"model.decoder.layers.{i}.activation_fn" for i in (0, 1))
    replace(model, second, Reference(read(model, second)))
    assert isinstance(layers[0].activation_fn, nn.ReLU)
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-5)


def test_a_copy_of_the_activation_is_read() -> None:
    model = tiny("apertus")
    site = find_ffns(model).sites[0]
    act = read(model, site).act
    assert act is not model.get_submodule(str(site.act))
    assert not any(parameter.requires_grad for parameter in act.parameters())
    assert model.get_submodule(str(site.act)).alpha_p.requires_grad


def test_the_tripwire_follows_the_dtype_of_down() -> None:
    model = tiny("bart").to(torch.bfloat16)
    sites, _ = replace_all(model)
    assert model.get_submodule(sites[0].down).weight.dtype == torch.bfloat16
