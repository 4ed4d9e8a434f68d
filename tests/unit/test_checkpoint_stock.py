"""Stock first: what plain transformers can express is stored so that it loads without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import ffsplit
from ffsplit.checkpoint.stock import stock_model
from ffsplit.ffn.sum import SumFFN
from tests.tiny import VOCABULARY, tiny
from tests.unit.checkpoint_helpers import PRUNE, UNEVEN, compressed, outputs

# The configuration's width fields of each family.
WIDTHS: dict[str, tuple[str, ...]] = {
    "llama": ("intermediate_size",),
    "llama-biased": ("intermediate_size",),
    "gemma2": ("intermediate_size",),
    "phi3": ("intermediate_size",),
    "apertus": ("intermediate_size",),
    "gpt2": ("n_inner",),
    "gpt-neo": ("intermediate_size",),
    "opt": ("ffn_dim",),
    "falcon": ("ffn_hidden_size",),
    "bert-classifier": ("intermediate_size",),
    "distilbert": ("hidden_dim",),
    "modernbert": ("intermediate_size",),
    "albert": ("intermediate_size",),
    "bart": ("encoder_ffn_dim", "decoder_ffn_dim"),
    "t5": ("d_ff",),
    "t5-v1.1": ("d_ff",),
}


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers as it is without ``import ffsplit``."""
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "ffsplit")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "ffsplit")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def gpt2(**fields: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, **fields)).eval()


def llama(**fields: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**sizes, **fields}, bos_token_id=1, eos_token_id=2)).eval()


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize("family", WIDTHS)
def test_uniform_pruning_is_stored_as_plain_transformers(family: str, tmp_path: Path) -> None:
    result = compressed(family, PRUNE)
    before = outputs(result.model)
    saved = ffsplit.save(result, tmp_path / "out")
    assert saved.kind == "stock"
    plain, info = type(result.model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert not any(isinstance(module, SumFFN) for module in plain.modules())
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    kept = {branch.neurons for ffn in result.plan.ffns for branch in ffn.spec.branches}
    assert {getattr(plain.config, field) for field in WIDTHS[family]} == kept
    close(outputs(plain), before)


@pytest.mark.parametrize("family", ["bloom", "xlm", "openai-gpt"])
def test_a_hard_coded_width_is_stored_in_our_format(family: str, tmp_path: Path) -> None:
    result = compressed(family, PRUNE)
    assert ffsplit.save(result, tmp_path / "out").kind == "ffsplit"
    assert torch.equal(outputs(type(result.model).from_pretrained(tmp_path / "out")), outputs(result.model))


@pytest.mark.parametrize("family", ["llama", "bart", "gpt2"])
def test_widths_that_differ_are_stored_in_our_format(family: str, tmp_path: Path) -> None:
    result = compressed(family, UNEVEN)
    assert ffsplit.save(result, tmp_path / "out").kind == "ffsplit"
    assert torch.equal(outputs(type(result.model).from_pretrained(tmp_path / "out")), outputs(result.model))


@pytest.mark.usefixtures("unregistered")
def test_a_derived_width_gets_a_value(tmp_path: Path) -> None:
    result = compressed(gpt2(n_inner=None), PRUNE)
    assert ffsplit.save(result, tmp_path / "out").kind == "stock"
    plain = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert plain.config.n_inner == result.plan.ffns[0].spec.neurons
    close(outputs(plain), outputs(result.model))


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize(
    "fields",
    [
        {"intermediate_size": 32},
        {"intermediate_size": VOCABULARY},
        {"intermediate_size": 64, "max_position_embeddings": 64},
        {"intermediate_size": 32, "vocab_size": 32, "max_position_embeddings": 32},
    ],
    ids=str,
)
def test_other_fields_of_the_same_value_stay(fields: dict[str, int], tmp_path: Path) -> None:
    model = llama(**{**fields, "vocab_size": VOCABULARY})
    result = compressed(model, PRUNE)
    assert ffsplit.save(result, tmp_path / "out").kind == "stock"
    plain = tf.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config.intermediate_size == result.plan.ffns[0].spec.neurons < fields["intermediate_size"]
    assert (plain.config.hidden_size, plain.config.vocab_size) == (32, VOCABULARY)
    assert plain.config.max_position_embeddings == model.config.max_position_embeddings
    close(outputs(plain), outputs(result.model))


@pytest.mark.usefixtures("unregistered")
def test_encoder_and_decoder_may_have_widths_of_their_own(tmp_path: Path) -> None:
    """Two encoder FFNs of 80 neurons and two decoder FFNs of 72, each pruned to its own width."""
    recipe = {"method": PRUNE, "overrides": [{"ffns": "0,1", "method": {**PRUNE, "keep": 0.8}}]}
    result = compressed("bart", recipe)
    assert ffsplit.save(result, tmp_path / "out").kind == "stock"
    plain = tf.BartForConditionalGeneration.from_pretrained(tmp_path / "out")
    widths = {ffn.name.split(".")[1]: ffn.spec.neurons for ffn in result.plan.ffns}
    assert (plain.config.encoder_ffn_dim, plain.config.decoder_ffn_dim) == (widths["encoder"], widths["decoder"])
    close(outputs(plain), outputs(result.model))


@pytest.mark.usefixtures("unregistered")
def test_a_full_budget_is_the_original_shape(tmp_path: Path) -> None:
    result = compressed("llama", {**PRUNE, "keep": 1.0})
    assert ffsplit.save(result, tmp_path / "out").kind == "stock"
    assert tf.LlamaForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 80


def test_saving_a_stock_result_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    result = compressed("llama", PRUNE)
    before, config = outputs(result.model), result.model.config.to_dict()
    ffsplit.save(result, tmp_path / "out")
    assert result.model.config.to_dict() == config
    assert torch.equal(outputs(result.model), before)


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize("family", ["llama", "apertus", "gpt2", "bert-mlm", "t5"])
def test_half_precision(family: str, tmp_path: Path) -> None:
    """Only weights are in the model's dtype: rotary frequencies keep their own."""
    model = tiny(family)
    model.save_pretrained(tmp_path / "dense")
    result = compressed(type(model).from_pretrained(tmp_path / "dense", dtype=torch.bfloat16), PRUNE)
    stock = stock_model(result.model, result.sites)
    assert stock is not None
    assert ffsplit.save(result, tmp_path / "out").kind == "stock"
    fresh = type(model).from_pretrained(tmp_path / "out")
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = (dict(getattr(one, kind)()) for one in (stock, fresh))
        assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in wanted.items()}
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(outputs(stock), outputs(fresh))


def test_a_model_that_was_cast_keeps_its_precision(tmp_path: Path) -> None:
    """The configuration still says bfloat16, the weights are float32 now and stay so."""
    tiny("llama").save_pretrained(tmp_path / "dense")
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16).float()
    result = compressed(model, PRUNE)
    expected = outputs(result.model)
    stock = stock_model(result.model, result.sites)
    assert stock is not None
    assert {parameter.dtype for parameter in stock.parameters()} == {torch.float32}
    close(outputs(stock), expected)


def test_an_ffn_in_two_dtypes_is_refused(tmp_path: Path) -> None:
    """T5 in float16 keeps its second projection in float32."""
    tiny("t5").save_pretrained(tmp_path)
    model = tf.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    with pytest.raises(ffsplit.ModelError, match=r"more than one dtype .*wi float16.*wo float32"):
        compressed(model, PRUNE)
