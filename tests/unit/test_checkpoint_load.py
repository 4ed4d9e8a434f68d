"""Loading with what people really type, and refusing what is damaged: a wrong model is never given."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertModel,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import ffsplit
from ffsplit.checkpoint.quantizer import FFSplitStorageConfig
from ffsplit.errors import CheckpointError, ModelError
from ffsplit.ffn.sum import SumFFN
from tests.tiny import tiny
from tests.unit.checkpoint_helpers import PARTLY, SPLIT, UNEVEN, compressed, edit_config, ids, outputs, stored_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loading")


@pytest.fixture
def llama(folder: Path) -> Path:
    return stored_llama(folder)[0]


@pytest.fixture
def expected(folder: Path) -> Tensor:
    return stored_llama(folder)[1]


@pytest.fixture
def damaged(llama: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    shutil.copytree(llama, tmp_path / "damaged")
    return tmp_path / "damaged"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    result = compressed("bert-mlm")
    return ffsplit.save(result, tmp_path_factory.mktemp("bert") / "out").directory, result.model


def sums(model: torch.nn.Module) -> list[SumFFN]:
    return [module for module in model.modules() if isinstance(module, SumFFN)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "auto"},
        {"dtype": torch.float32},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": True},
        {"use_safetensors": True},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
def test_options_of_from_pretrained(options: dict[str, Any], llama: Path, expected: Tensor) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(llama, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_another_dtype(dtype: torch.dtype, llama: Path, expected: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    stored = load_file(llama / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if not stored[name].is_floating_point():
            assert torch.equal(tensor, stored[name]), name
    found = outputs(model).float()
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.05


def test_casting_a_loaded_model(llama: Path) -> None:
    """``model.to(dtype)`` and ``from_pretrained(dtype=...)`` give the same FFNs."""
    cast = AutoModelForCausalLM.from_pretrained(llama).to(torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    for one, other in zip(sums(cast), sums(loaded), strict=True):
        assert torch.equal(one(x), other(x))


def test_the_default_dtype_is_put_back(llama: Path) -> None:
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


def test_without_a_head(llama: Path, tmp_path: Path) -> None:
    full, body = AutoModelForCausalLM.from_pretrained(llama), AutoModel.from_pretrained(llama)
    tokens = ids()
    with torch.no_grad():
        found = body(input_ids=tokens).last_hidden_state
        assert torch.equal(found, full.model(input_ids=tokens).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path / "body")), outputs(body))
    headed = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    with torch.no_grad():
        assert torch.equal(headed.model(input_ids=tokens).last_hidden_state, found)


def test_decompressing_a_model_without_its_head(llama: Path) -> None:
    body = AutoModel.from_pretrained(llama)
    dense = ffsplit.decompress(body)
    assert not sums(dense)
    torch.testing.assert_close(outputs(dense), outputs(body), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModel])
def test_another_head(auto: Any, bert: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    place, source = bert
    model, info = auto.from_pretrained(place, output_loading_info=True)
    assert not [name for name in info["missing_keys"] if "encoder.layer" in name]
    body = model if isinstance(model, BertModel) else model.bert
    hidden = [m(input_ids=ids()).last_hidden_state for m in (body.eval(), source.bert.eval())]
    assert torch.equal(*hidden)
    model.save_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(outputs(auto.from_pretrained(tmp_path / "tuned")), outputs(model))


def test_a_body_is_loaded_with_a_head(tmp_path: Path) -> None:
    result = compressed("bert")
    ffsplit.save(result, tmp_path / "out")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = model.bert(input_ids=ids()).last_hidden_state
        assert torch.equal(found, result.model(input_ids=ids()).last_hidden_state)


def test_saving_a_loaded_model_again_and_decompressing(llama: Path, expected: Tensor, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "again", max_shard_size="30KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(outputs(again), expected)
    dense = ffsplit.decompress(again)
    torch.testing.assert_close(outputs(dense), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs(again), expected)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(outputs(LlamaForCausalLM.from_pretrained(tmp_path / "dense")), outputs(dense))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decompressing_in_the_dtype_of_the_model(dtype: torch.dtype, llama: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype)
    dense = ffsplit.decompress(loaded)
    assert {parameter.dtype for parameter in dense.parameters()} == {dtype}
    assert {buffer.dtype for buffer in dense.buffers()} == {torch.float32}
    torch.testing.assert_close(outputs(dense), outputs(loaded), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("family", ["t5", "bart", "bert-classifier", "gpt2", "albert", "apertus"])
def test_decompressing_other_families(family: str, tmp_path: Path) -> None:
    result = compressed(family, UNEVEN if family in ("t5", "bart", "gpt2") else SPLIT)
    ffsplit.save(result, tmp_path / "out")
    loaded = type(result.model).from_pretrained(tmp_path / "out")
    dense = ffsplit.decompress(loaded)
    assert not sums(dense)
    torch.testing.assert_close(outputs(dense), outputs(loaded), rtol=1e-4, atol=1e-5)


def test_a_dense_model_cannot_be_decompressed() -> None:
    with pytest.raises(ModelError, match="not compressed"):
        ffsplit.decompress(tiny("llama"))


def test_generating(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    tokens = ids(2, 7)
    made = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False,
                          eos_token_id=None, pad_token_id=0)  # fmt: skip
    assert made.shape == (2, 13)
    with torch.no_grad():
        choices = model(input_ids=made[:, :-1]).logits[:, 6:].argmax(-1)
    assert torch.equal(made[:, 7:], choices)


def test_compiling(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(input_ids=ids(), use_cache=False).logits
        torch.testing.assert_close(found, model(input_ids=ids(), use_cache=False).logits)


def test_copying_a_loaded_model(llama: Path, expected: Tensor) -> None:
    assert torch.equal(outputs(copy.deepcopy(AutoModelForCausalLM.from_pretrained(llama))), expected)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_adapters_of_peft(llama: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(llama)
    before = outputs(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(outputs(adapted.get_base_model()), before)


def test_a_partly_compressed_model(tmp_path: Path) -> None:
    result = compressed("llama", PARTLY)
    before = outputs(result.model)
    assert ffsplit.save(result, tmp_path / "out").kind == "ffsplit"
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ffns"]
    assert [entry["site"]["name"] for entry in stored] == ["model.layers.1.mlp"]
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert len(sums(loaded)) == 1
    assert torch.equal(outputs(loaded), before)
    torch.testing.assert_close(outputs(ffsplit.decompress(loaded)), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel, LlamaForCausalLM])
@pytest.mark.parametrize("partly", [False, True])
def test_without_the_import_loading_raises(
    auto: Any, partly: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if partly:
        llama = ffsplit.save(compressed("llama", PARTLY), tmp_path / "out").directory
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "ffsplit")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "ffsplit")
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        auto.from_pretrained(llama)


def set_version(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda stored: stored.update(version=value)


def set_site(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda stored: stored["ffns"][1]["site"].update(values)


def set_projection(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda stored: stored["ffns"][1]["spec"]["branches"][1]["up"].update(values)


def fewer_neurons(stored: dict[str, Any]) -> None:
    branch = stored["ffns"][0]["spec"]["branches"][0]
    for name in ("up", "gate"):
        branch[name]["shape"][0] -= 1
    branch["down"]["shape"][1] -= 1


TAMPERED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "version 99": set_version(99),
    "version text": set_version("1"),
    "version 0": set_version(0),
    "version null": set_version(None),
    "unknown key": lambda stored: stored.update(colour="red"),
    "no ffns": lambda stored: stored.pop("ffns"),
    "empty ffns": lambda stored: stored.update(ffns=[]),
    "ffns no list": lambda stored: stored.update(ffns=7),
    "ffn no mapping": lambda stored: stored.update(ffns=[7]),
    "site no mapping": lambda stored: stored["ffns"][0].update(site="model.layers.0.mlp"),
    "no spec": lambda stored: stored["ffns"][0].pop("spec"),
    "unknown kind": set_projection(kind="sparse"),
    "bits": set_projection(bits=9),
    "other bits": set_projection(bits=7),
    "no group": lambda stored: stored["ffns"][0]["spec"]["branches"][1]["up"].pop("group"),
    "symmetric": set_projection(symmetric=True),
    "site that does not exist": set_site(name="model.layers.7.mlp", down="model.layers.7.mlp.down_proj"),
    "other down": set_site(down="model.layers.9.mlp.down_proj"),
    "site of an attention": set_site(name="model.layers.1.self_attn", down="model.layers.1.self_attn.o_proj"),
    "path of another type": set_site(gate=7),
    "unknown activation": set_site(act=None, act_name="no-such-function"),
    "no activation": set_site(act=None, act_name=None),
    "site kind": set_site(kind="somewhere"),
    "d_model": set_site(d_model=0),
    "wrong neurons": lambda stored: stored["ffns"][0]["spec"]["branches"][0]["up"]["shape"].__setitem__(0, 3),
    "a branch less": lambda stored: stored["ffns"][0]["spec"]["branches"].pop(),
    "a branch more": lambda stored: stored["ffns"][0]["spec"].update(
        branches=[*stored["ffns"][0]["spec"]["branches"], stored["ffns"][0]["spec"]["branches"][0]]
    ),
    "bias": lambda stored: stored["ffns"][0]["spec"].update(bias=True),
    "branch bias": lambda stored: stored["ffns"][0]["spec"]["branches"][0].update(up_bias=True),
    "linear": lambda stored: stored["ffns"][0]["spec"].update(linear={"kind": "dense", "shape": [32, 32]}),
    "an ffn less": lambda stored: stored["ffns"].pop(),
    "an ffn twice": lambda stored: stored["ffns"].append(stored["ffns"][0]),
}


@pytest.mark.parametrize("change", TAMPERED)
def test_a_tampered_configuration_is_refused(change: str, damaged: Path) -> None:
    edit_config(damaged, TAMPERED[change])
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_consistently_fewer_neurons_do_not_fit_the_tensors(damaged: Path) -> None:
    edit_config(damaged, fewer_neurons)
    with pytest.raises(CheckpointError, match=r"should be \(.*, the files have \("):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_messages_say_what_and_where(damaged: Path) -> None:
    pristine = (damaged / "config.json").read_text()
    for change, message in {
        "version 99": "format version 99",
        "site that does not exist": "no module 'model.layers.7.mlp.down_proj'",
        "unknown kind": "sparse",
        "a branch less": "model.layers.0.mlp: .*'branches",
        "empty ffns": "ffns is empty",
        "an ffn less": "model.layers.1.mlp.down_proj.weight belongs to .* does not list",
    }.items():
        (damaged / "config.json").write_text(pristine)
        edit_config(damaged, TAMPERED[change])
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(damaged)


def test_truncated_tensors(damaged: Path) -> None:
    file = damaged / "model.safetensors"
    for size in (file.stat().st_size - 1, 100, 4, 0):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            AutoModelForCausalLM.from_pretrained(damaged)


@pytest.mark.parametrize("name", ["branches.0.up.weight", "branches.1.down.scale", "down_proj.weight"])
@pytest.mark.parametrize("edit", ["drop", "rename"])
def test_a_missing_tensor(name: str, edit: str, damaged: Path) -> None:
    tensors = load_file(damaged / "model.safetensors")
    taken = tensors.pop(f"model.layers.0.mlp.{name}")
    if edit == "rename":
        tensors[f"model.layers.0.mlp.{name}s"] = taken
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="do not fit together"):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_missing_tensors_of_a_whole_ffn(damaged: Path) -> None:
    tensors = {n: t for n, t in load_file(damaged / "model.safetensors").items() if "layers.0.mlp" not in n}
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp"):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_a_missing_shard(llama: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_configuration_that_is_no_json(damaged: Path) -> None:
    (damaged / "config.json").write_text("{")
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_another_architecture(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    config.update(model_type="gpt2", architectures=["GPT2LMHeadModel"])
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another architecture"):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_a_stored_configuration_survives_its_own_dictionary(llama: Path) -> None:
    stored = AutoModelForCausalLM.from_pretrained(llama).config.quantization_config
    again = FFSplitStorageConfig.from_dict(json.loads(json.dumps(stored.to_dict())))
    assert again.entries() == stored.entries()
    assert again.to_dict() == stored.to_dict()
