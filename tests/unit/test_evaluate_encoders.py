from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from ffsplit.calibrate.tokens import TokenWindows, tokenize_documents
from ffsplit.errors import DataError, ModelError
from ffsplit.evaluate.embeddings import pearson, sentence_embeddings, sentence_similarity, spearman
from ffsplit.evaluate.hidden_states import hidden_similarity
from ffsplit.evaluate.masked_lm import MASKED_SHARE, compare_masked_models, masked_lm, masked_queries
from tests.unit.evaluate_helpers import build, byte_tokenizer, disturbed, tiny_bert

TOKENIZER = byte_tokenizer()
SENTENCES = ["the first sentence", "a second, rather longer sentence", "third", "and a fourth one here"]
IDS = {"mask_id": TOKENIZER.mask_token_id, "special_ids": TOKENIZER.all_special_ids}
SEQ2SEQ = {"d_model": 16, "pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": 2}
BART = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1} | {
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "forced_eos_token_id": None,
}
T5 = {"d_ff": 32, "num_layers": 1, "d_kv": 8, "num_heads": 2}


def lines(repeat: int = 1) -> TokenWindows:
    return tokenize_documents(SENTENCES * repeat, TOKENIZER, seq_len=24)


def test_masks_are_fixed_by_the_seed_and_spare_special_tokens_and_padding() -> None:
    windows = lines(20)
    queries = masked_queries(windows, **IDS, batch_size=7)
    again = masked_queries(windows, **IDS, batch_size=11)
    assert [t for q in queries for t in q.targets.tolist()] == [t for q in again for t in q.targets.tolist()]
    other = masked_queries(windows, **IDS, batch_size=7, seed=1)
    assert [q.targets.tolist() for q in queries] != [q.targets.tolist() for q in other]
    ordinary = ~torch.isin(windows.input_ids, torch.tensor(TOKENIZER.all_special_ids))
    masked = sum(query.targets.numel() for query in queries)
    assert masked / int(ordinary.sum()) == pytest.approx(MASKED_SHARE, abs=0.02)
    for query, batch in zip(queries, windows.batches(7), strict=True):
        changed = query.inputs["input_ids"] != batch["input_ids"]
        assert torch.equal(changed.flatten().nonzero().squeeze(1), query.positions)
        assert torch.equal(batch["input_ids"].flatten()[query.positions], query.targets)
        assert (query.inputs["input_ids"][changed] == TOKENIZER.mask_token_id).all()
        assert not set(query.targets.tolist()) & set(TOKENIZER.all_special_ids)


@pytest.mark.parametrize("config", ["BertConfig", "RobertaConfig", "DistilBertConfig", "ModernBertConfig"])
def test_masked_accuracy_and_cross_entropy(config: str) -> None:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2} if config == "DistilBertConfig" else {}
    model = build("AutoModelForMaskedLM", config, scale=4.0, **special, **sizes)
    windows = lines(3)
    measured = masked_lm(model, windows, **IDS, batch_size=5)
    with torch.no_grad():
        parts = [
            (model(**query.inputs).logits.flatten(0, 1)[query.positions], query.targets)
            for query in masked_queries(windows, **IDS, batch_size=5)
        ]
    logits, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    assert measured.cross_entropy == pytest.approx(float(cross_entropy(logits, targets)), rel=1e-5)
    assert measured.accuracy == pytest.approx(float((logits.argmax(-1) == targets).double().mean()))
    assert measured.tokens == targets.numel()
    assert (measured.sequences, measured.seed, measured.share) == (12, 0, 0.15)
    assert f"{measured.tokens:,} tokens masked in 12 sequences" in measured.describe()


def test_both_masked_models_see_the_same_masks() -> None:
    dense, compressed, windows = tiny_bert(), disturbed(tiny_bert()), lines(4)
    both = compare_masked_models(dense, compressed, windows, **IDS, seed=3)
    assert both.dense == masked_lm(dense, windows, **IDS, seed=3)
    assert both.compressed == masked_lm(compressed, windows, **IDS, seed=3)
    assert both.agreement.kl > 0
    assert both.agreement.tokens == both.dense.tokens
    assert compare_masked_models(dense, dense, windows, **IDS).agreement.kl == 0.0


def test_text_of_special_tokens_only_is_refused() -> None:
    with pytest.raises(DataError, match="none of the 4 tokens was masked"):
        masked_lm(tiny_bert(), TokenWindows.from_ids(torch.tensor([[1, 2, 1, 2]])), **IDS)


@pytest.mark.parametrize(
    ("auto", "config", "options"),
    [
        ("AutoModel", "BertConfig", {}),
        ("AutoModelForSequenceClassification", "BertConfig", {}),
        ("AutoModelForCausalLM", "LlamaConfig", {}),
        ("AutoModel", "BartConfig", SEQ2SEQ | BART),
        ("AutoModelForSeq2SeqLM", "BartConfig", SEQ2SEQ | BART),
        ("AutoModelForSeq2SeqLM", "T5Config", SEQ2SEQ | T5),
        ("AutoModel", "T5Config", SEQ2SEQ | T5),
    ],
)
def test_hidden_states_of_any_text_model(auto: str, config: str, options: dict[str, object]) -> None:
    dense, windows = build(auto, config, scale=3.0, **options), lines()
    same = hidden_similarity(dense, dense, windows)
    assert same.cosine == pytest.approx(1.0)
    assert same.relative_error == 0.0
    assert same.tokens == windows.tokens
    near = hidden_similarity(dense, disturbed(dense, 0.1), windows)
    far = hidden_similarity(dense, disturbed(dense, 1.0), windows)
    assert 0 < near.relative_error < far.relative_error
    assert 1 > near.cosine > far.cosine


def test_hidden_similarity_is_that_of_real_tokens() -> None:
    dense, compressed, windows = tiny_bert("AutoModel"), disturbed(tiny_bert("AutoModel")), lines()
    mask = windows.attention_mask
    assert mask is not None
    with torch.no_grad():
        inputs = {"input_ids": windows.input_ids, "attention_mask": mask}
        a, b = (model(**inputs).last_hidden_state[mask.bool()] for model in (dense, compressed))
    measured = hidden_similarity(dense, compressed, windows, batch_size=3)
    assert measured.relative_error == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-4)
    assert measured.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=-1).mean()), rel=1e-5)
    assert "cosine" in measured.describe()


def test_hidden_states_that_cannot_be_compared() -> None:
    dense = tiny_bert("AutoModel")
    with pytest.raises(DataError, match="width 16 and 32"):
        hidden_similarity(dense, tiny_bert("AutoModel", hidden_size=32), lines())
    broken = tiny_bert("AutoModel")
    with torch.no_grad():
        broken.encoder.layer[1].output.dense.bias[0] = torch.inf
    with pytest.raises(ModelError, match="not finite"):
        hidden_similarity(dense, broken, lines())


def test_embeddings_average_real_tokens_in_the_given_order() -> None:
    model = tiny_bert("AutoModel")
    together = sentence_embeddings(model, TOKENIZER, SENTENCES, batch_size=3)
    alone = []
    for sentence in SENTENCES:
        encoded = TOKENIZER(sentence, return_tensors="pt")
        with torch.no_grad():
            alone.append(model(encoded["input_ids"]).last_hidden_state[0].mean(0))
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_long_sentences_are_cut_at_the_models_limit() -> None:
    model = tiny_bert("AutoModel")
    long, cut = "x" * 500, "x" * 62
    embeddings = sentence_embeddings(model, TOKENIZER, [long, cut])
    torch.testing.assert_close(embeddings[0], embeddings[1])
    short = sentence_embeddings(model, TOKENIZER, [long, "x" * 6], seq_len=8)
    torch.testing.assert_close(short[0], short[1])


def test_a_model_in_training_is_measured_without_dropout_and_left_in_training() -> None:
    model = tiny_bert("AutoModel")
    expected = sentence_embeddings(model, TOKENIZER, SENTENCES)
    torch.testing.assert_close(sentence_embeddings(model.train(), TOKENIZER, SENTENCES), expected)
    assert model.training


def test_correlation_with_gold_scores() -> None:
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    model = tiny_bert("AutoModel")
    left, right = SENTENCES[:3], [SENTENCES[0], SENTENCES[3], SENTENCES[1]]
    embeddings = sentence_embeddings(model, TOKENIZER, left + right)
    gold = torch.cosine_similarity(embeddings[:3], embeddings[3:], dim=-1)
    result = sentence_similarity(model, TOKENIZER, left, right, gold.tolist())
    assert (result.spearman, result.pairs) == (pytest.approx(1.0), 3)
    assert result.describe().startswith("Spearman 100.00")


@pytest.mark.parametrize(
    ("values", "gold", "message"),
    [
        ([1, 2], [1, 2, 3], "need equal lengths"),
        ([1], [1], "need equal lengths >= 2"),
        ([1, 1], [1, 2], "all values"),
        ([1, 2], [3, 3], "all gold scores are equal"),
        ([1, float("nan")], [1, 2], "not finite"),
    ],
)
def test_undefined_correlations_are_refused(values: list[float], gold: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        spearman(values, gold)


def test_bad_sentences() -> None:
    model = tiny_bert("AutoModel")
    with pytest.raises(DataError, match="at least one sentence"):
        sentence_embeddings(model, TOKENIZER, [])
    with pytest.raises(DataError, match="1 first and 2 second"):
        sentence_similarity(model, TOKENIZER, ["a"], ["b", "c"], [1.0])
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[7] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        sentence_embeddings(model, TOKENIZER, [TOKENIZER.decode([7])])
