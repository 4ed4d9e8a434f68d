"""``ffsplit inspect``: the figures against plain formulas, the plan against what really is stored."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ffsplit.calibrate.cache import TensorCache
from ffsplit.calibrate.statistics import FFNStatistics, collect
from ffsplit.errors import ModelError
from ffsplit.families import find_ffns
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.weights import FFNWeights
from ffsplit.pipeline.compress import compress
from ffsplit.pipeline.footprint import disk_bytes, footprint, statistics_bytes
from ffsplit.pipeline.inspect import concentration, gini, inspect
from tests.tiny import tiny
from tests.unit.cli_fixtures import SIZES, SMALL, Call, saved
from tests.unit.evaluate_helpers import tiny_llama


def test_gini() -> None:
    assert gini(torch.full((10,), 3.0)) == pytest.approx(0)
    assert gini(torch.tensor([0.0, 0, 0, 1])) == pytest.approx(0.75)
    assert gini(torch.tensor([1.0, 3.0])) == pytest.approx(0.25)
    assert gini(torch.zeros(4)) == 0


def test_concentration_against_plain_formulas() -> None:
    torch.manual_seed(0)
    up, down = torch.randn(100, 8), torch.randn(8, 100)
    up[7] *= 50
    up[3] = 0
    ffn = FFNWeights(up, down, nn.ReLU())
    chunks = [torch.randn(20, 8), torch.randn(30, 8)]
    found = concentration("layer", collect(ffn, chunks), down)
    outputs = ffn.hidden(torch.cat(chunks)).abs() * down.norm(dim=0)
    norms = outputs.square().sum(0).sqrt()
    share = norms.square().sort(descending=True).values.cumsum(0) / norms.square().sum()
    assert found.top_1 == pytest.approx(float(share[0]), rel=1e-5)
    assert found.top_3 == pytest.approx(float(share[2]), rel=1e-5)
    assert found.top_10 == pytest.approx(float(share[9]), rel=1e-5)
    active = (outputs > outputs.mean(1, keepdim=True)).float().mean(0)
    assert found.mean_active == pytest.approx(float(active.mean()), rel=1e-5)
    assert found.heavy_active == pytest.approx(float(active[norms.argsort(descending=True)[:3]].mean()), rel=1e-5)
    assert (found.dead, found.tokens) == (1, 50)


def test_concentration_without_tokens() -> None:
    with pytest.raises(ModelError, match=r"layer\.3.*never reached"):
        concentration("layer.3", FFNStatistics.zeros(4, 6), torch.zeros(4, 6))


def test_statistics_bytes_are_those_of_the_sums() -> None:
    sums = FFNStatistics.zeros(12, 20)
    stored = sum(getattr(sums, field.name).nbytes for field in fields(sums))
    assert statistics_bytes(FFNShape(12, 20, gated=True)) == stored


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-mlm", "bart", "albert"])
def test_cache_bytes_are_those_of_a_real_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    plan = footprint(model, find_ffns(model), itemsize=4, samples=3, seq_len=16)
    sizes: list[int] = []

    class Watched(TensorCache):
        def put(self, key: str, tensors: object) -> None:
            super().put(key, tensors)  # type: ignore[arg-type]
            sizes.append(sum(tensor.nbytes for stored in self._memory.values() for tensor in stored))

    monkeypatch.setattr("ffsplit.pipeline.fit.TensorCache", Watched)
    ids = torch.arange(48).reshape(3, 16) + 5
    batches = [{"input_ids": row[None]} for row in ids]
    if model.config.is_encoder_decoder:
        batches = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches]
    compress(model, recipe="svd", keep=0.5, calibration=batches)
    assert 0.5 * plan.activation_cache_bytes <= max(sizes) <= plan.activation_cache_bytes


def test_model_bytes_and_disk_bytes() -> None:
    model = tiny("llama")
    found = find_ffns(model)
    plan = footprint(model, found, itemsize=4, samples=3, seq_len=16)
    assert plan.model_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert plan.peak_bytes > plan.model_bytes + plan.statistics_bytes
    shape = FFNShape(32, 80, gated=True)
    assert disk_bytes([shape] * 2, plan.model_bytes, 4, keep=1.0) == plan.model_bytes
    assert disk_bytes([shape] * 2, plan.model_bytes, 4, bits=32) == plan.model_bytes
    saved_by_half = plan.model_bytes - plan.disk_bytes["keep 0.5"]
    assert saved_by_half == 2 * shape.parameters * 4 // 2


def test_inspection_of_a_language_model(cli: Call, llama: Path) -> None:
    document = cli("inspect", llama, "--json", *SMALL).document
    assert document["ffns"] == 2
    assert document["groups"][0] | {"first": "", "last": ""} == {
        "count": 2,
        "first": "",
        "last": "",
        "d_model": 32,
        "d_ff": 64,
        "gated": True,
        "fused": None,
        "act": "SiLUActivation",
        "kind": "module",
    }
    assert document["covered_share_of_ffn"] == 1
    assert document["calibration"]["tokens"] == 96
    assert [layer["ffn"] for layer in document["layers"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for layer in document["layers"]:
        assert 0 < layer["top_1"] <= layer["top_3"] <= layer["top_10"] < 1
        assert layer["tokens"] == 96
    assert (document["footprint"]["samples"], document["footprint"]["seq_len"]) == (3, 32)


def test_tables_for_people(cli: Call, llama: Path) -> None:
    outcome = cli("inspect", llama)
    assert outcome.code == 0, outcome.err
    for word in ("LlamaForCausalLM", "gated, module", "top 3 %", "Gini", "estimated peak", "3 bits", "model.layers.1"):
        assert word in outcome.out
    assert "8 windows of builtin" in outcome.out
    assert "48 windows of 64 tokens" in outcome.out  # what a compression takes by default, cut to the model's positions


def test_dead_neurons_are_counted(cli: Call, llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "dead"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:5] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    layers = cli("inspect", model, "--json", *SMALL).document["layers"]
    assert [layer["dead"] for layer in layers] == [0, 5]


def test_a_model_that_reads_images_shows_its_structure(cli: Call, tmp_path: Path) -> None:
    model = saved(tiny("vit"), tmp_path / "vit", tokenizer=False)
    outcome = cli("inspect", model)
    assert outcome.code == 0, outcome.err
    for word in ("ViTModel", "plain", "not measured", "pixel_values", "estimated peak"):
        assert word in outcome.out
    assert cli("inspect", model, "--json").document["layers"] == []


def test_a_model_without_tokenizer_shows_its_structure(tmp_path: Path) -> None:
    found = inspect(str(saved(tiny_llama(**SIZES), tmp_path / "silent", tokenizer=False)))
    assert found.not_run == "the model has no tokenizer"
    assert found.ffns == 2
    assert json.dumps(found.to_dict())


@pytest.mark.parametrize("name", ["t5-v1.1", "bert-mlm", "albert", "gpt2"])
def test_other_families(cli: Call, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = tiny(name)
    model.resize_token_embeddings(261)
    document = cli("inspect", saved(model, folder), "--json", *SMALL).document
    assert len(document["layers"]) == document["ffns"] == len(find_ffns(model).sites)
    assert all(layer["tokens"] > 0 for layer in document["layers"])


def test_weights_that_are_not_finite(cli: Call, llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "nan"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    outcome = cli("inspect", model, *SMALL)
    assert outcome.code == 2
    assert "model.layers.0.mlp.down_proj.weight" in outcome.err
