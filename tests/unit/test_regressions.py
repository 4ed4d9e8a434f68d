"""Defects that a review found, each with the input that showed it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import ffsplit
from ffsplit.calibrate.batches import make_batches
from ffsplit.calibrate.cache import TensorCache
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.checkpoint import save as save_module
from ffsplit.errors import CheckpointError, DataError, ModelError, RecipeError
from ffsplit.families import find_ffns
from ffsplit.pipeline.load import open_source
from ffsplit.pipeline.recipe import load_recipe, parse_indices
from tests.unit.cli_fixtures import SIZES, SMALL, Call, saved
from tests.unit.evaluate_helpers import tiny_bert, tiny_llama

IDS = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))


def _without(folder: Path, wanted: str) -> str:
    """Take the first tensor whose name holds ``wanted`` out of a checkpoint."""
    file = folder / "model.safetensors"
    state = load_file(file)
    name = next(name for name in sorted(state) if wanted in name)
    del state[name]
    save_file(state, file, metadata={"format": "pt"})
    return name


def _with_config(folder: Path, **values: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
def test_a_bare_model_without_some_of_its_weights(build: Callable[..., Any], tmp_path: Path) -> None:
    """Its tensors have no prefix, so nothing was found missing, and random weights were compressed."""
    build(**SIZES).base_model.save_pretrained(tmp_path / "model")
    lost = _without(tmp_path / "model", "layer")
    with pytest.raises(ModelError, match=lost):
        open_source(str(tmp_path / "model")).load()


def test_a_bare_model_may_lack_its_pooler(tmp_path: Path) -> None:
    AutoModel.from_config(tiny_bert(**SIZES).config).save_pretrained(tmp_path / "model")
    assert "pooler" in _without(tmp_path / "model", "pooler")
    assert open_source(str(tmp_path / "model")).load() is not None


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
def test_a_checkpoint_that_names_a_head_it_does_not_hold(build: Callable[..., Any], tmp_path: Path) -> None:
    """Its head was filled with random numbers, whose answers were compared and distilled (all-mpnet-base-v2 is one)."""
    model = build(**SIZES, tie_word_embeddings=False)
    body = AutoModel.from_config(model.config)
    body.save_pretrained(tmp_path / "model")
    _with_config(tmp_path / "model", architectures=[type(model).__name__])
    loaded = open_source(str(tmp_path / "model")).load()
    assert type(loaded) is type(body)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in body.state_dict().items())
    result = ffsplit.compress(str(tmp_path / "model"), recipe="prune", keep=0.5, calibration=IDS, device="cpu")
    ffsplit.save(result, tmp_path / "small")
    assert json.loads((tmp_path / "small" / "config.json").read_text())["architectures"] == [type(body).__name__]


def test_part_of_a_head_is_enough_to_keep_it(tmp_path: Path) -> None:
    folder = saved(tiny_bert(**SIZES), tmp_path / "model", tokenizer=False)
    assert "cls" in _without(folder, "cls")
    assert type(open_source(str(folder)).load()) is tf.BertForMaskedLM


@pytest.mark.parametrize("architecture", [["WibbleForCausalLM"], ["logging"], "LlamaForCausalLM"])
def test_unknown_architecture(architecture: object, tmp_path: Path) -> None:
    """It was loaded as the bare model: the output head was lost without a word."""
    folder = _with_config(saved(tiny_llama(**SIZES), tmp_path / "model", tokenizer=False), architectures=architecture)
    with pytest.raises(ModelError, match="names the architecture"):
        _ = open_source(str(folder)).model_class


@pytest.mark.parametrize(
    "values",
    [{"hidden_size": "abc"}, {"num_attention_heads": 0}, {"hidden_act": "wibble"}, {"intermediate_size": -4},
     {"dtype": "float7"}],
)  # fmt: skip
def test_configuration_with_a_wrong_value(values: dict[str, Any], tmp_path: Path) -> None:
    folder = _with_config(saved(tiny_llama(**SIZES), tmp_path / "model", tokenizer=False), **values)
    with pytest.raises(ModelError, match=r"no model can be (read there|built)"):
        open_source(str(folder)).skeleton()


def test_weights_that_are_a_strange_pickle(tmp_path: Path) -> None:
    folder = saved(tiny_llama(**SIZES), tmp_path / "model", tokenizer=False)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cbuiltins\nprint\nq\x00.")
    with pytest.raises(ModelError, match="could not load the weights"):
        open_source(str(folder)).load()


def test_tokenizer_that_is_a_list(tmp_path: Path) -> None:
    folder = saved(tiny_llama(**SIZES), tmp_path / "model")
    (folder / "tokenizer.json").write_text("[]")
    with pytest.raises(ModelError, match="tokenizer cannot be read"):
        open_source(str(folder)).tokenizer()


@pytest.mark.parametrize("name", ["m" * 300, "here/" + "m" * 300])
def test_model_name_that_no_file_system_has(cli: Call, name: str, untouched: Path) -> None:
    outcome = cli("compress", name, "--out", untouched, "--keep", "0.5")
    assert outcome.code == 2
    assert "255" in outcome.err
    with pytest.raises(ModelError, match="255"):
        open_source(name)


@pytest.mark.parametrize("length", [240, 300])
def test_output_name_that_leaves_no_room(cli: Call, llama: Path, untouched: Path, length: int) -> None:
    outcome = cli("compress", llama, "--out", untouched.with_name("x" * length), "--keep", "0.5", *SMALL)
    assert outcome.code == 2
    assert "too long" in outcome.err


def test_output_that_is_a_link_to_itself(cli: Call, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    outcome = cli("compress", llama, "--out", tmp_path / "loop", "--keep", "0.5", *SMALL)
    assert outcome.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_output_that_is_a_link_to_an_empty_directory(cli: Call, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place")
    assert cli("compress", llama, "--out", tmp_path / "link", "--recipe", "svd", "--keep", "0.5", *SMALL).code == 0
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "place"]
    assert (tmp_path / "place" / "config.json").is_file()


def test_output_that_is_the_current_directory(
    cli: Call, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli("compress", llama, "--out", ".", "--recipe", "svd", "--keep", "0.5", *SMALL).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert (tmp_path / "here" / "config.json").is_file()


def test_a_refusal_in_the_first_layer_leaves_no_journal(
    cli: Call, llama: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise DataError("not on this text")

    monkeypatch.setattr("ffsplit.pipeline.fit._fit", refuse)
    outcome = cli("compress", llama, "--out", untouched, "--keep", "0.5", *SMALL)
    assert outcome.code == 2
    assert "not on this text" in outcome.err


def test_overrides_that_leave_every_ffn() -> None:
    recipe = {"method": {"method": "prune", "keep": 0.5}, "overrides": [{"ffns": "0-1", "method": None}]}
    with pytest.raises(RecipeError, match="nothing to do"):
        ffsplit.compress(tiny_llama(**SIZES), calibration=IDS, recipe=recipe)


@pytest.mark.parametrize("field", ["heavy", "ridge"])
def test_infinite_settings(field: str) -> None:
    with pytest.raises(RecipeError, match="finite"):
        load_recipe({"method": {"method": "ffsplit", "keep": 0.5, field: float("inf")}})


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_seed_that_no_generator_takes(seed: int) -> None:
    with pytest.raises(RecipeError, match="seed"):
        load_recipe("prune", keep=0.5, seed=seed)


def test_range_too_long_to_write_out() -> None:
    with pytest.raises(RecipeError, match="out of range"):
        parse_indices("0-99999999999999", 2)


def test_recipe_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "deep.yaml")


@pytest.mark.parametrize("name", ["deep.jsonl", "deep.json"])
def test_records_nested_without_end(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("[" * 100_000 + "\n")
    with pytest.raises(DataError, match="not JSON"):
        ffsplit.compress(tiny_llama(**SIZES), object(), calibration=str(tmp_path / name), recipe="prune", keep=0.5)


@pytest.mark.parametrize("heavy", [0, 0.0])
def test_no_heavy_neurons_beside_a_linear_map(heavy: float, tmp_path: Path) -> None:
    method = {"method": "ffsplit", "keep": 0.3, "rest": "linear", "heavy": heavy}
    result = ffsplit.compress(tiny_llama(**SIZES), calibration=IDS, recipe={"method": method})
    assert [ffn.spec.neurons for ffn in result.plan.ffns] == [0, 0]
    saved_as = ffsplit.save(result, tmp_path / "out")
    assert saved_as.kind == "ffsplit"


def test_one_batch_instead_of_a_list() -> None:
    """A mapping is a sequence of its keys: an encoder was calibrated on the words "input_ids" and "attention_mask"."""
    model = tiny_bert(**SIZES)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    sizes: dict[str, int] = {"seq_len": 16, "samples": 4, "batch_size": 1}
    alone, listed = (make_batches(model, None, source, **sizes) for source in (batch, [batch]))
    assert (alone.sha256, alone.tokens) == (listed.sha256, IDS.numel())


def test_batch_of_lists() -> None:
    with pytest.raises(DataError, match="'input_ids' is a list"):
        ffsplit.compress(tiny_bert(**SIZES), calibration=[{"input_ids": IDS.tolist()}], recipe="prune", keep=0.5)


def test_padding_that_the_model_adds_itself() -> None:
    """Longformer pads to its attention window; those positions were counted as text."""
    torch.manual_seed(0)
    config = tf.LongformerConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, attention_window=32, pad_token_id=1,
    )  # fmt: skip
    model = tf.LongformerForMaskedLM(config).eval()
    mask = torch.ones_like(IDS)
    mask[0, 10:] = 0
    found = find_ffns(model)
    with TensorCache() as cache:
        replay = BlockReplay(model, [{"input_ids": IDS, "attention_mask": mask}], cache, torch.device("cpu"))
        inputs = replay.capture(found.blocks[0])
        assert [store.tokens for store in inputs.values()] == [int(mask.sum())]


def test_model_that_draws_random_numbers_when_it_runs(tmp_path: Path) -> None:
    """A masked autoencoder hides other patches every time, so its reload looked like another model."""
    torch.manual_seed(0)
    config = tf.ViTMAEConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4
    )
    images = [{"pixel_values": torch.randn(2, 3, 16, 16)}]
    result = ffsplit.compress(tf.ViTMAEModel(config), calibration=images, recipe="svd", keep=0.5)
    before = torch.get_rng_state()
    ffsplit.save(result, tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_that_was_cast_in_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    """Its rotary frequencies are cast too, and 16 bits round otherwise after a reload: saving was refused."""
    result = ffsplit.compress(tiny_llama(**SIZES).to(dtype), calibration=IDS, recipe="prune", keep=0.5)
    ffsplit.save(result, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == dtype


def test_a_tensor_that_comes_back_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = ffsplit.compress(tiny_llama(**SIZES), calibration=IDS, recipe="prune", keep=0.5)
    write = save_module._write

    def spoil(*arguments: Any) -> None:
        write(*arguments)
        file = arguments[3] / "model.safetensors"
        state = load_file(file)
        state["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-6
        save_file(state, file, metadata={"format": "pt"})

    monkeypatch.setattr(save_module, "_write", spoil)
    with pytest.raises(CheckpointError, match=r"up_proj.weight' is another one after a reload"):
        ffsplit.save(result, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_model_that_is_compressed_already() -> None:
    model = ffsplit.compress(tiny_llama(**SIZES), calibration=IDS, recipe="svd", keep=0.5).model
    with pytest.raises(ModelError, match="compressed already"):
        ffsplit.compress(model, calibration=IDS, recipe="svd", keep=0.5)


@pytest.mark.parametrize("model", [5, torch.nn.Linear(3, 3)])
def test_something_else_than_a_model(model: Any) -> None:
    with pytest.raises(ModelError, match="must be a transformers model"):
        ffsplit.compress(model, calibration=IDS, recipe="svd", keep=0.5)


@pytest.mark.parametrize(("recipe", "warned"), [("prune", True), ("svd", False)])
def test_little_text_is_said(recipe: str, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    ffsplit.compress(tiny_llama(**SIZES), calibration=IDS, recipe=recipe, keep=0.5)
    assert ("64 tokens of calibration text are few for FFNs of 64 neurons" in caplog.text) == warned


def test_blocks_that_return_more_than_tensors() -> None:
    """A stage of Swin v2 returns the image's size too, which the replay turned into None."""
    torch.manual_seed(0)
    config = tf.Swinv2Config(
        image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[4, 4], window_size=2
    )  # fmt: skip
    images = [{"pixel_values": torch.randn(2, 3, 16, 16)}]
    result = ffsplit.compress(tf.Swinv2Model(config), calibration=images, recipe="prune", keep=0.7)
    assert len(result.sites) == 2
    assert all(layer["output_error"] < 0.2 for layer in result.report["layers"])
