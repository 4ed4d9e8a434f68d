from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

import ffsplit
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.devices import default_device
from ffsplit.errors import DataError, ModelError, RecipeError
from ffsplit.families import read
from ffsplit.families.forward import evaluating, without_cache
from ffsplit.ffn.sum import SumFFN
from ffsplit.pipeline.fit import cache_home
from ffsplit.pipeline.recipe import Recipe
from tests.tiny import tiny
from tests.unit.evaluate_helpers import byte_tokenizer, tiny_bert, tiny_llama
from tests.unit.family_batches import FAMILIES, Batch, family_batches, token_ids

PRUNE = {"method": {"method": "prune", "keep": 0.7}}
LOW_BIT = {"method": {"method": "ffsplit", "bits": 5.5, "group": 16}}
CHANCE = {"method": {"method": "prune", "keep": 0.7, "score": "random"}}


def run(family: str | PreTrainedModel, recipe: Any = PRUNE, **options: Any) -> ffsplit.CompressionResult:
    if isinstance(family, str):
        options.setdefault("calibration", family_batches(family))
        family = tiny(family)
    return ffsplit.compress(family, recipe=recipe, **{"device": "cpu", **options})


def sums(model: torch.nn.Module) -> list[SumFFN]:
    return [module for module in model.modules() if isinstance(module, SumFFN)]


@torch.no_grad()
def outputs(model: PreTrainedModel, batches: list[Batch]) -> Tensor:
    return torch.cat([pytree.tree_leaves(model(**batch))[0].flatten() for batch in batches])


def same_weights(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    expected, found = first.state_dict(), second.state_dict()
    return expected.keys() == found.keys() and all(torch.equal(t, found[name]) for name, t in expected.items())


def total_error(result: ffsplit.CompressionResult) -> float:
    return sum(layer["output_error"] for layer in result.report["layers"])


@pytest.mark.parametrize("recipe", [PRUNE, LOW_BIT], ids=["prune", "low-bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_end_to_end(family: str, recipe: dict[str, Any]) -> None:
    batches = family_batches(family)
    before = outputs(tiny(family), batches)
    result = run(family, recipe)
    after = outputs(result.model, batches)
    assert bool(torch.isfinite(after).all())
    assert not torch.equal(before, after)
    assert float((after - before).norm() / before.norm()) < 0.35
    modules = {name: module for name, module in result.model.named_modules() if isinstance(module, SumFFN)}
    assert {ffn.name: ffn.spec for ffn in result.plan.ffns} == {name: module.spec for name, module in modules.items()}
    assert not any(parameter.requires_grad for module in modules.values() for parameter in module.parameters())
    assert [layer["ffn"] for layer in result.report["layers"]] == [ffn.name for ffn in result.plan.ffns]
    assert all(0 < layer["output_error"] < 0.6 for layer in result.report["layers"])
    assert not result.model.training
    assert not any("forward" in module.__dict__ for module in result.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in result.model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_neurons_beat_random_ones(family: str) -> None:
    assert total_error(run(family)) < total_error(run(family, CHANCE))


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_padded_and_unreached_tokens_are_not_counted(family: str) -> None:
    batches = family_batches(family)
    for layer in run(family).report["layers"]:
        decoder = ".decoder." in f".{layer['ffn']}"
        mask = "decoder_attention_mask" if decoder else "attention_mask"
        real = sum(int(b[mask].sum()) if mask in b else b["input_ids"].numel() for b in batches)
        assert layer["tokens"] == real


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_what_padding_holds_changes_nothing(family: str) -> None:
    batches, noise = family_batches(family), family_batches(family)
    for batch in noise:
        for name, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
            if mask in batch:
                batch[name] = torch.where(batch[mask].bool(), batch[name], torch.full_like(batch[name], 99))
    first, second = (run(family, calibration=given).model for given in (batches, noise))
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "phi3"])
def test_fitting_on_the_dense_prefix_differs(family: str) -> None:
    results = [run(family, {**LOW_BIT, "propagate": propagate}) for propagate in (True, False)]
    first, second = (sums(result.model) for result in results)
    assert all(torch.equal(a, first[0].state_dict()[name]) for name, a in second[0].state_dict().items())
    assert not same_weights(results[0].model, results[1].model)
    assert bool(torch.isfinite(outputs(results[1].model, family_batches(family))).all())
    assert results[1].recipe.propagate is False


def test_dense_prefix_fits_are_independent_of_each_other() -> None:
    """Without propagation a layer does not care what became of the ones before it."""
    alone = {**PRUNE, "propagate": False, "overrides": [{"ffns": "0", "method": None}]}
    both, last = run("llama", {**PRUNE, "propagate": False}), run("llama", alone)
    first, second = sums(both.model)[1], sums(last.model)[0]
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_overrides_by_layer(tmp_path: Path) -> None:
    recipe = {
        **PRUNE,
        "overrides": [{"ffns": "0", "method": None}, {"ffns": "-1", "method": {"method": "quantize", "code_bits": 8}}],
    }
    dense = tiny("bart")
    result = run("bart", recipe)
    sites = result.sites
    for name, tensor in read(dense, sites[0]).tensors().items():
        assert torch.equal(read(result.model, sites[0]).tensors()[name], tensor)
    kinds = [None if ffn.method is None else ffn.method.method for ffn in result.plan.ffns]
    assert kinds == [None, "prune", "prune", "quantize"]
    assert len(sums(result.model)) == len(result.report["layers"]) == 3
    before = outputs(result.model, family_batches("bart"))
    saved = ffsplit.save(result, tmp_path / "out")
    loaded = type(result.model).from_pretrained(saved.directory).eval()
    assert torch.equal(outputs(loaded, family_batches("bart")), before)
    assert len(sums(loaded)) == 3


@pytest.mark.parametrize("family", ["llama", "t5", "deberta-v2", "albert", "bart"])
@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_a_cache_on_disk_gives_the_same_bits(family: str, drift: float, tmp_path: Path) -> None:
    recipe = {**PRUNE, "drift": drift}
    on_disk = run(family, recipe, cache_dir=tmp_path / "cache")
    assert same_weights(on_disk.model, run(family, recipe).model)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_on_disk_is_removed_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        assert len(list(tmp_path.iterdir())) == 2
        raise ZeroDivisionError

    monkeypatch.setattr(BlockReplay, "advance", fail)
    with pytest.raises(ZeroDivisionError):
        run("llama", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress_reaches_the_end_of_everything() -> None:
    seen: list[tuple[str, int, int]] = []
    run("llama", {**PRUNE, "drift": 0.5}, progress=lambda *call: seen.append(call))
    assert [call for call in seen if call[0] == "fit"] == [("fit", 1, 2), ("fit", 2, 2)]
    assert {label for label, _, _ in seen} > {"capture model.layers.1", "advance model.layers.0"}
    assert all(1 <= done <= total for _, done, total in seen)
    assert seen[-1] == ("fit", 2, 2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_modes_are_put_back(training: bool, use_cache: bool) -> None:
    model = tiny("llama").train(training)
    model.model.layers[1].self_attn.train(not training)
    model.config.use_cache = use_cache
    run(model, calibration=family_batches("llama"))
    assert model.training == training
    assert model.model.layers[1].self_attn.training == (not training)
    assert all(module.training == training for ffn in sums(model) for module in ffn.modules())
    assert model.config.use_cache == use_cache


def test_modes_are_put_back_after_a_failure() -> None:
    model = tiny("llama").train()

    def fail() -> None:
        with evaluating(model), without_cache(model):
            assert not model.training
            assert not model.config.use_cache
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(module.training for module in model.modules())
    assert model.config.use_cache


def test_dropout_is_off_while_calibrating() -> None:
    model = tiny("bert")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    result = run(model.train(), calibration=family_batches("bert"))
    assert same_weights(result.model, run("bert").model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", [PRUNE, LOW_BIT, {"method": "ffsplit"}], ids=["prune", "low-bit", "default"])
def test_a_model_keeps_its_dtype(dtype: torch.dtype, recipe: dict[str, Any]) -> None:
    result = run(tiny("llama-biased").to(dtype), recipe, calibration=family_batches("llama"))
    floats = {t.dtype for name, t in result.model.named_parameters() if t.is_floating_point()}
    assert floats == {dtype}
    assert result.model.dtype == dtype
    after = outputs(result.model, family_batches("llama"))
    assert after.dtype == dtype
    assert bool(torch.isfinite(after).all())


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_devices(device: Any) -> None:
    result = run("llama", device=device)
    assert {parameter.device.type for parameter in result.model.parameters()} == {"cpu"}


def test_where_activations_wait() -> None:
    assert cache_home(torch.device("cpu"), 10**9, 10**4) == torch.device("cpu")
    assert default_device().type in {"cpu", "cuda", "xpu", "hpu", "npu"}


@pytest.mark.parametrize(
    "recipe",
    [CHANCE, LOW_BIT, {**PRUNE, "drift": 1.0}, {"method": {"method": "whitened-svd", "keep": 0.6}}],
    ids=["random", "low-bit", "drift", "whitened"],
)
def test_the_same_seed_gives_the_same_bits(recipe: dict[str, Any]) -> None:
    torch.manual_seed(1)
    first = run("llama", recipe, seed=7).model
    torch.manual_seed(2)
    assert same_weights(first, run("llama", recipe, seed=7).model)


def test_the_seed_matters() -> None:
    first, second = (run("llama", CHANCE, seed=seed) for seed in (0, 5))
    assert not same_weights(first.model, second.model)
    assert (first.recipe.seed, second.recipe.seed) == (0, 5)


def test_every_layer_draws_numbers_of_its_own() -> None:
    dense = tiny("llama")
    recipe = {"method": {**CHANCE["method"], "refit": False}}
    kept = []
    for layer, ffn in zip(dense.model.layers, sums(run("llama", recipe).model), strict=True):
        distance = torch.cdist(ffn.branches[0].up.weight, layer.mlp.up_proj.weight)
        kept.append(distance.argmin(1).tolist())
    assert len(set(kept[0])) == len(kept[0]) == len(kept[1])
    assert kept[0] != kept[1]


def test_the_global_random_state_is_left_alone() -> None:
    model, batches = tiny("llama"), family_batches("llama")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    run(model, CHANCE, calibration=batches)
    assert torch.equal(torch.get_rng_state(), state)


TOKENIZER = byte_tokenizer()
TEXTS = ["The quick brown fox jumps over the lazy dog. " * 8, "Pack my box with five dozen liquor jugs. " * 8]


@pytest.mark.parametrize("model", [tiny_llama, tiny_bert], ids=["llama", "bert"])
@pytest.mark.parametrize("kind", ["texts", "name", "path", "builtin", "default"])
def test_text_as_calibration(model: Any, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(TEXTS))
    given: dict[str, Any] = {"texts": TEXTS, "name": str(file), "path": file, "builtin": "builtin", "default": None}
    result = run(model(), tokenizer=TOKENIZER, calibration=given[kind], samples=2, seq_len=24)
    stored = result.recipe.calibration
    expected = {"texts": "texts", "name": str(file), "path": str(file), "builtin": "builtin", "default": "builtin"}
    assert stored.source == expected[kind]
    assert (stored.samples, stored.seq_len) == (2, 24)
    assert result.report["calibration"]["tokens"] == 48
    assert result.tokenizer is TOKENIZER


def test_ids_as_calibration() -> None:
    result = run("llama", calibration=token_ids(5, 17), samples=3)
    assert result.report["calibration"]["tokens"] == 51
    stored = result.recipe.calibration
    assert (stored.source, stored.samples, stored.seq_len) == ("token ids", 3, 17)
    assert result.recipe.model_dump()["calibration"]["seq_len"] == 17


def test_ready_made_batches_as_calibration() -> None:
    result = run("whisper")
    assert result.report["calibration"]["source"] == result.recipe.calibration.source == "batches"
    assert result.report["calibration"]["samples"] == result.recipe.calibration.samples == 4


@pytest.mark.parametrize("recipe", [PRUNE, Recipe.model_validate(PRUNE)], ids=["values", "object"])
def test_the_default_window_gives_way_to_the_models_positions(recipe: Any) -> None:
    result = run(tiny_llama(), recipe, tokenizer=TOKENIZER, calibration=TEXTS, samples=2)
    assert result.recipe.calibration.seq_len == 64
    with pytest.raises(DataError, match="64 positions"):
        run(tiny_llama(), recipe, tokenizer=TOKENIZER, calibration=TEXTS, samples=2, seq_len=65)


def test_the_stored_recipe_repeats_the_run() -> None:
    first = run(tiny_llama(), tokenizer=TOKENIZER, calibration="builtin", samples=3, seq_len=32)
    again = run(tiny_llama(), first.recipe, tokenizer=TOKENIZER)
    assert same_weights(first.model, again.model)
    assert again.recipe == first.recipe


def test_a_report_says_what_was_reached() -> None:
    result = run("llama")
    budget = result.report["budget"]
    assert budget["keep_ffn"] == result.plan.keep <= 0.7
    assert budget["keep_ffn"] < budget["keep_linear"] < budget["keep_model"] < 1
    assert result.report["coverage"] == {
        "ffns": 2,
        "covered_share_of_ffn": 1.0,
        "ffn_share_of_model": pytest.approx(2 * 3 * 32 * 80 / tiny("llama").num_parameters()),
        "uncovered_notes": [],
    }


def test_a_model_by_name(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    options = {"recipe": PRUNE, "calibration": token_ids(2, 16), "device": "cpu"}
    by_name = ffsplit.compress(tmp_path, **options)
    loaded = type(model).from_pretrained(tmp_path)
    assert same_weights(by_name.model, ffsplit.compress(loaded, **options).model)
    assert by_name.tokenizer is not None
    assert ffsplit.compress(str(tmp_path), dtype=torch.bfloat16, **options).model.dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_an_unknown_device_is_refused(device: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"device '{device}': not a.*this machine has cpu"):
        run("llama", device=device)
    with pytest.raises(RecipeError, match=f"device '{device}'"):
        ffsplit.recover_checkpoint(tmp_path, device=device)


def test_a_number_is_no_text() -> None:
    with pytest.raises(DataError, match="text is a int; it must be"):
        run("llama", calibration=3)


def test_a_compressed_model_is_refused() -> None:
    result = run("llama")
    with pytest.raises(ModelError):
        run(result.model, calibration=family_batches("llama"))


def test_an_ffn_without_any_data_is_refused() -> None:
    batches = family_batches("bert")
    for batch in batches:
        batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    with pytest.raises(ModelError, match="never reached this FFN"):
        run("bert", calibration=batches)


def test_an_overflow_in_the_calibration_inputs_is_refused() -> None:
    images = family_batches("vit")
    images[1]["pixel_values"][0, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="input_gram holds NaN or Inf"):
        run("vit", calibration=images)
