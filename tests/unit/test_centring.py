"""Centring FFN outputs: the same outputs of the model, ``down`` without a mean, and a reason wherever it is read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import ffsplit
from ffsplit.errors import ModelError, RecipeError
from ffsplit.families import centring, find_ffns
from ffsplit.families.centring import centre_norms, check_centring
from ffsplit.families.outputs import worst_change
from ffsplit.families.projection import get_weight
from ffsplit.pipeline.decide import _store
from ffsplit.pipeline.journal import Journal
from ffsplit.pipeline.recipe import load_recipe
from tests.conformance.test_methods import ids, logits
from tests.tiny import tiny
from tests.unit.cli_fixtures import Call
from tests.unit.test_norms import same, scaled, state


def returned(model: PreTrainedModel) -> torch.Tensor:
    """The logits, or the last hidden states of a model without a head."""
    with torch.no_grad():
        output = model(input_ids=ids())
    return output.logits if "logits" in output else output.last_hidden_state


def means(model: PreTrainedModel) -> torch.Tensor:
    """Largest mean of a column, or of the bias, of every ``down``, relative to the largest entry."""
    found = []
    for site in find_ffns(model).sites:
        weight, bias = get_weight(model.get_submodule(site.down))
        for tensor in [weight] if bias is None else [weight, bias]:
            found.append(tensor.double().mean(dim=0).abs().max() / tensor.abs().max())
    return torch.stack(found)


# Norms before the FFN and after it, Linear and Conv1D, parallel attention, one FFN for all layers, no norm weights.
@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "gpt-neox", "phi", "falcon", "cohere", "olmo", "bert", "bert-classifier", "mpnet",
               "openai-gpt", "modernbert", "albert"],
)  # fmt: skip
def test_the_model_computes_the_same(family: str) -> None:
    model = scaled(family)
    before, old = returned(model), state(model)
    assert bool((means(model) > 1e-3).all())
    results = centre_norms(model)
    torch.testing.assert_close(returned(model), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    assert bool((means(model) < 1e-12).all())
    assert [result.refused for result in results] == [None] * len(find_ffns(model).sites)
    new = state(model)
    changed = {name.rpartition(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {result.down for result in results}


@pytest.mark.parametrize("family", ["whisper", "bart", "m2m100", "vit", "wav2vec2", "clip-text", "deberta-v2", "bloom"])
def test_other_kinds_of_models(family: str) -> None:
    """`centre_norms` compares every output of a model or a projection by itself."""
    model = scaled(family)
    assert all(result.refused is None for result in centre_norms(model))
    assert bool((means(model) < 1e-12).all())


@pytest.mark.parametrize(
    ("family", "reader"),
    [
        ("llama", "model.layers.1.self_attn.q_proj"),
        ("gemma2", "model.layers.1.self_attn.q_proj"),
        ("olmo2", "model.layers.1.self_attn.q_proj"),
        ("t5", "encoder.block.1.layer.0.SelfAttention.q"),
        ("clip-vision", "the model"),
    ],
)
def test_refused_with_the_reader_and_left_alone(family: str, reader: str) -> None:
    model = scaled(family)
    old = state(model)
    message = rf"(?s)RMSNorm keeps it.*0[^\n]*: the mean over d_model of its output is read.*what {reader} returns"
    for function in (centre_norms, check_centring):
        with pytest.raises(ModelError, match=message):
            function(model)
    assert same(state(model), old)


def test_only_ffns_whose_mean_is_not_read_are_centred() -> None:
    """CLIP returns the residual stream of its vision model, and that of its text model behind a LayerNorm."""
    model = scaled("clip")
    old = state(model)
    results = centre_norms(model)
    assert {result.ffn.partition(".")[0]: result.refused is None for result in results} == {
        "text_model": True,
        "vision_model": False,
    }
    new = state(model)
    assert {name.partition(".")[0] for name in old if not torch.equal(old[name], new[name])} == {"text_model"}


def test_one_more_reader_of_the_stream_is_seen() -> None:
    """A single RMSNorm among LayerNorms, which no name tells of."""
    model = scaled("gpt2")
    model.transformer.h[1].ln_1 = nn.RMSNorm(32, eps=1e-6, dtype=torch.float64)
    first, second = centre_norms(model)
    assert "what transformer.h.1.attn.c_attn returns" in str(first.refused)
    assert second.refused is None


def test_a_scale_behind_the_ffn_is_seen() -> None:
    """A factor for every feature turns the all-ones vector into one that LayerNorm sees (LayerScale)."""
    model = scaled("gpt2")
    factors = torch.linspace(0.5, 2, 32, dtype=torch.float64)
    model.transformer.h[0].mlp.register_forward_hook(lambda _m, _a, output: output * factors)
    assert "is read" in str(centre_norms(model)[0].refused)


def test_a_weight_that_two_modules_share_is_left_alone() -> None:
    model = scaled("opt")
    first, second = model.model.decoder.layers
    second.fc2.weight = first.fc2.weight
    old = state(model)
    with pytest.raises(ModelError, match=r"layers.0.fc2.weight is shared with another module"):
        centre_norms(model)
    assert same(state(model), old)


def test_checking_changes_nothing() -> None:
    model = scaled("gpt2")
    old = state(model)
    assert check_centring(model) == centre_norms(scaled("gpt2"))
    assert same(state(model), old)


def test_twice_is_once() -> None:
    model = scaled("opt")
    centre_norms(model)
    once = state(model)
    centre_norms(model)
    for name, tensor in state(model).items():
        torch.testing.assert_close(tensor, once[name], rtol=0, atol=1e-15)


def test_a_rank_less() -> None:
    model = scaled("gpt2")
    down = model.transformer.h[0].mlp.c_proj
    assert int(torch.linalg.matrix_rank(down.weight)) == 32
    centre_norms(model)
    assert int(torch.linalg.matrix_rank(down.weight)) == 31


def test_other_outputs_put_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scaled("gpt2")
    old = state(model)
    monkeypatch.setattr(centring, "centred", lambda tensor: tensor.double() * 1.01)
    with pytest.raises(ModelError, match=r"centring its FFNs changes what it returns by 0\.0"):
        centre_norms(model)
    assert same(state(model), old)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = scaled("gpt2").to(dtype)
    before = logits(model)
    centre_norms(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert float((logits(model) - before).float().norm() / before.float().norm()) < 0.03
    assert bool((means(model) < 1e-3).all())
    with pytest.raises(ModelError, match="RMSNorm keeps it"):
        centre_norms(scaled("llama").to(dtype))


def test_one_huge_token_does_not_hide_the_others() -> None:
    """Trained models have such a token; here the stream itself is returned, in which it drowns all others."""
    model = scaled("clip-vision").to(torch.bfloat16)
    size = torch.tensor([3000.0] + [1.0] * 4).to(torch.bfloat16).view(-1, 1)
    next(m for n, m in model.named_modules() if n.endswith("pre_layrnorm")).register_forward_hook(
        lambda _m, _a, output: output * size
    )
    with pytest.raises(ModelError, match="what the model returns"):
        centre_norms(model)


def test_no_number_is_the_worst_change() -> None:
    """Also as the second of the tensors that a module returns."""
    one, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    path, change = worst_change({"a": [one, one], "b": [one]}, {"a": [one, nan], "b": [2 * one]})
    assert path == "a"
    assert change != change


def test_freshly_initialised_models_qualify_too() -> None:
    """Their FFNs add little to the stream, so the probe has to be as large as the stream."""
    assert all(result.refused is None for result in centre_norms(tiny("gpt2")))
    with pytest.raises(ModelError, match="RMSNorm keeps it"):
        centre_norms(tiny("llama").to(torch.bfloat16))


def test_the_result_is_a_plain_checkpoint(tmp_path: Path) -> None:
    model = scaled("gpt2").float()
    ffsplit.centre_norms(model)
    model.save_pretrained(tmp_path / "centred")
    assert "quantization_config" not in (tmp_path / "centred" / "config.json").read_text()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "centred").eval()), logits(model))


def compressed(family: str, method: dict[str, Any], **fields: Any) -> ffsplit.CompressionResult:
    recipe = {"method": method, **fields}
    return ffsplit.compress(scaled(family).float(), recipe=recipe, calibration=ids(), device="cpu")


def test_svd_needs_a_rank_less() -> None:
    """At a rank of d_model - 1 the factors of ``down`` are exact, those of one that was not centred are not."""
    budget = {"method": "svd", "keep": 1 - 1e-6}
    dense = logits(scaled("gpt2").float())
    plain, centred = (logits(compressed("gpt2", budget, centre_norms=centre).model) for centre in (False, True))
    assert float((centred - dense).norm()) < float((plain - dense).norm())


def test_a_recipe_centres_and_says_so(tmp_path: Path) -> None:
    result = compressed("gpt2", {"method": "prune", "keep": 0.5}, centre_norms=True)
    assert result.recipe.centre_norms
    assert [entry["down"] for entry in result.report["centred_ffns"]] == [
        f"transformer.h.{layer}.mlp.c_proj" for layer in range(2)
    ]
    saved = ffsplit.save(result, tmp_path / "out")
    assert saved.kind == "stock"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(result.model))
    assert compressed("gpt2", {"method": "prune", "keep": 0.5}).report["centred_ffns"] == []


def test_folded_first_and_then_centred() -> None:
    model = scaled("gpt2").float()
    before = logits(model)
    recipe = {"method": {"method": "quantize", "code_bits": 8, "group": 16, "rounding": "rtn"}}
    result = ffsplit.compress(model, recipe=recipe, fold_norms=True, centre_norms=True, calibration=ids(), device="cpu")
    assert [len(result.report[name]) for name in ("folded_norms", "centred_ffns")] == [2, 2]
    assert float((logits(model) - before).norm() / before.norm()) < 0.03


def test_a_model_that_cannot_be_centred_is_not_folded_either() -> None:
    model = scaled("llama").float()
    old = state(model)
    recipe = {"method": {"method": "prune", "keep": 0.5}, "fold_norms": True, "centre_norms": True}
    with pytest.raises(ModelError, match="RMSNorm keeps it"):
        ffsplit.compress(model, recipe=recipe, calibration=ids(), device="cpu")
    assert same(state(model), old)


def test_the_option_of_the_command_line(cli: Call, bert: Path, llama: Path, tmp_path: Path) -> None:
    options = ("--recipe", "svd", "--keep", "0.5", "--samples", "2", "--seq-len", "16", "--device", "cpu")
    outcome = cli("compress", bert, "--out", tmp_path / "out", *options, "--centre-norms", "--json")
    assert outcome.code == 0, outcome.err
    assert "centre_norms: true" in (tmp_path / "out" / "ffsplit_recipe.yaml").read_text()
    refused = cli("compress", llama, "--out", tmp_path / "no", *options, "--centre-norms")
    assert refused.code == 2
    assert "RMSNorm keeps it" in " ".join(refused.err.split())
    assert not (tmp_path / "no").exists()


def test_a_resumed_run_centres_again(tmp_path: Path) -> None:
    """The journal belongs to the model as it came; FFNs that it holds were fitted to the centred one."""
    recipe = {"method": {"method": "quantize", "code_bits": 4, "group": 16}, "centre_norms": True}
    options: dict[str, Any] = {"recipe": recipe, "calibration": ids(), "device": "cpu", "journal": tmp_path / "journal"}
    first = ffsplit.compress(scaled("gpt2").float(), **options)
    (tmp_path / "journal" / "ffn-0001.safetensors").unlink()
    again = ffsplit.compress(scaled("gpt2").float(), **options)
    assert torch.equal(logits(first.model), logits(again.model))


def test_measurements_of_a_centred_model_are_kept_apart(tmp_path: Path) -> None:
    def folder(**fields: bool) -> Path:
        identity = {"model": "m", "data": "d", "dtype": "torch.float32", "versions": {"torch": "2"}}
        job: Any = SimpleNamespace(identity=lambda: identity, recipe=load_recipe("prune", keep=0.5, **fields))
        return _store(job, Journal(tmp_path / "journal", {}), tmp_path / "measured")

    assert len({folder(), folder(fold_norms=True), folder(centre_norms=True)}) == 3
    assert folder() == folder(centre_norms=False)


def test_recovery_does_not_compare_centred_ffns_with_the_dense_ones() -> None:
    recipe = {"method": {"method": "prune", "keep": 0.5}, "centre_norms": True, "recovery": {"stages": "refit"}}
    with pytest.raises(RecipeError, match="centre_norms"):
        ffsplit.compress(scaled("gpt2").float(), recipe=recipe, calibration=ids(), device="cpu")
