from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ffsplit.calibrate.sources import load_texts
from ffsplit.calibrate.tokens import tokenize_documents, tokenize_windows
from ffsplit.errors import DataError
from ffsplit.evaluate.agreement import compare_language_models
from ffsplit.evaluate.evaluate import evaluate
from ffsplit.evaluate.hidden_states import hidden_similarity
from ffsplit.evaluate.kinds import ModelKind, model_kind
from ffsplit.evaluate.masked_lm import compare_masked_models
from ffsplit.evaluate.perplexity import perplexity
from tests.unit.evaluate_helpers import build, byte_tokenizer, disturbed, tiny_bert, tiny_llama

TOKENIZER = byte_tokenizer()
TEXT = ["some text to read " * 10, "and some more of it " * 10]


@pytest.mark.parametrize(
    ("auto", "config", "kind"),
    [
        ("AutoModelForCausalLM", "LlamaConfig", ModelKind.CAUSAL),
        ("AutoModelForCausalLM", "GPT2Config", ModelKind.CAUSAL),
        ("AutoModel", "LlamaConfig", ModelKind.ENCODER),
        ("AutoModelForMaskedLM", "BertConfig", ModelKind.MASKED),
        ("AutoModelForMaskedLM", "ElectraConfig", ModelKind.MASKED),
        ("AutoModelForMaskedLM", "MPNetConfig", ModelKind.MASKED),
        ("AutoModel", "BertConfig", ModelKind.ENCODER),
        ("AutoModelForSequenceClassification", "BertConfig", ModelKind.ENCODER),
        ("AutoModelForSeq2SeqLM", "T5Config", ModelKind.ENCODER),
    ],
)
def test_kinds_of_models(auto: str, config: str, kind: ModelKind) -> None:
    sizes = {"d_model": 16, "d_ff": 32, "num_layers": 1, "d_kv": 8, "num_heads": 2} if config == "T5Config" else {}
    assert model_kind(build(auto, config, pad_token_id=1, **sizes)) is kind


def test_a_class_of_the_users_own_keeps_its_kind() -> None:
    parent = type(tiny_llama())
    model = tiny_llama()
    model.__class__ = type("Mine", (parent,), {})
    assert model_kind(model) is ModelKind.CAUSAL


def test_a_causal_model_alone_and_against_its_dense_one() -> None:
    dense, model = tiny_llama(), disturbed(tiny_llama())
    windows = tokenize_windows(TEXT, TOKENIZER, seq_len=32, samples=4)
    alone = evaluate(model, None, windows)
    assert alone.quality == perplexity(model, windows)
    assert (alone.dense, alone.agreement, alone.hidden, alone.dense_size) == (None, None, None, None)
    both = evaluate(model, TOKENIZER, TEXT, dense, seq_len=32, samples=4)
    expected = compare_language_models(dense, model, windows)
    assert (both.quality, both.dense, both.agreement) == (expected.compressed, expected.dense, expected.agreement)
    assert both.size == both.dense_size
    assert both.kind == "causal"
    assert [line.split(" ")[0] for line in both.describe()] == ["dense:", "this", "KL", f"{both.size.parameters:,}"]


def test_ids_need_no_tokenizer() -> None:
    model = tiny_llama()
    ids = torch.randint(5, 200, (2, 16))
    assert evaluate(model, None, ids).quality == perplexity(model, tokenize_windows(ids, None))


def test_a_masked_model() -> None:
    dense, model = tiny_bert(), disturbed(tiny_bert())
    windows = tokenize_documents(TEXT, TOKENIZER, seq_len=32)
    result = evaluate(model, TOKENIZER, TEXT, dense, seq_len=32, seed=5)
    special = TOKENIZER.all_special_ids
    expected = compare_masked_models(
        dense, model, windows, mask_id=TOKENIZER.mask_token_id, special_ids=special, seed=5
    )
    assert (result.quality, result.dense, result.agreement) == (
        expected.compressed,
        expected.dense,
        expected.agreement,
    )
    assert evaluate(model, TOKENIZER, windows, seed=5).quality == expected.compressed
    with pytest.raises(DataError, match="BertForMaskedLM is measured on masked tokens; give a tokenizer"):
        evaluate(model, None, windows)


def test_an_encoder_is_measured_against_its_dense_model_only() -> None:
    dense, model = tiny_bert("AutoModel"), disturbed(tiny_bert("AutoModel"))
    result = evaluate(model, TOKENIZER, TEXT, dense, seq_len=16)
    assert result.hidden == hidden_similarity(dense, model, tokenize_documents(TEXT, TOKENIZER, seq_len=16))
    assert result.quality is None
    with pytest.raises(DataError, match="BertModel has no language-model head"):
        evaluate(model, TOKENIZER, TEXT)


def test_a_source_is_read_from_its_evaluation_half_and_fits_the_model() -> None:
    result = evaluate(tiny_llama(), TOKENIZER, samples=2)
    texts = load_texts("builtin", split="evaluation")
    assert result.quality == perplexity(tiny_llama(), tokenize_windows(texts, TOKENIZER, seq_len=64, samples=2))
    assert result.provenance["data"] | {"tokens_sha256": ""} == {
        "source": "builtin",
        "split": "evaluation",
        "samples": 2,
        "seq_len": 64,
        "tokens": 128,
        "tokens_sha256": "",
        "text_sha256": texts.sha256,
    }


def test_a_file_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 200)
    result = evaluate(tiny_llama(), TOKENIZER, tmp_path / "a.txt", seq_len=32)
    assert result.quality is not None
    assert (result.quality.source, result.quality.tokens) == ("a.txt", 6 * 31)


def test_the_result_is_strict_json() -> None:
    result = evaluate(disturbed(tiny_llama()), TOKENIZER, TEXT, tiny_llama(), seq_len=32, samples=2, seed=9)
    assert result.quality is not None
    endless = replace(result, quality=replace(result.quality, value=float("inf")))
    stored = json.loads(json.dumps(endless.to_dict(), allow_nan=False))
    assert stored["quality"]["value"] is None
    assert stored["dense"]["value"] == result.to_dict()["dense"]["value"]
    assert stored["agreement"]["tokens"] == 62
    assert stored["provenance"]["seed"] == 9
    assert stored["size"]["parameters"] == result.size.parameters
