from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffsplit.calibrate.tokens import TokenWindows, tokenize_documents
from ffsplit.errors import DataError, ModelError
from ffsplit.evaluate import scoring
from ffsplit.evaluate.agreement import compare_language_models
from ffsplit.evaluate.logits import LogitReader
from ffsplit.evaluate.perplexity import perplexity
from ffsplit.families.forward import evaluating
from ffsplit.ops.divergence import kl_divergence
from tests.unit.evaluate_helpers import VOCABULARY, build, byte_tokenizer, disturbed, tiny_llama

SOFT_CAPPED = {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
BART_DECODER = {
    "d_model": 16,
    "decoder_ffn_dim": 32,
    "decoder_attention_heads": 2,
    "decoder_layers": 2,
    "pad_token_id": 1,
}


def windows(samples: int = 5, seq_len: int = 24) -> TokenWindows:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (samples, seq_len), generator=generator)
    return TokenWindows.from_ids(ids, name="random", split="test")


def reference_log_probabilities(model: PreTrainedModel, given: TokenWindows) -> Tensor:
    with torch.no_grad():
        return model(given.input_ids).logits.double().log_softmax(-1)[:, :-1]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_is_exp_of_the_mean_nll_of_all_predicted_tokens(batch_size: int) -> None:
    model, given = tiny_llama(), windows()
    log_p = reference_log_probabilities(model, given)
    nll = -log_p.gather(-1, given.input_ids[:, 1:, None]).mean()
    measured = perplexity(model, given, batch_size)
    assert measured.nll == pytest.approx(float(nll), rel=1e-6)
    assert measured.value == pytest.approx(math.exp(nll), rel=1e-5)
    assert (measured.tokens, measured.windows, measured.seq_len, measured.stride) == (5 * 23, 5, 24, 24)
    assert (measured.source, measured.split, measured.sha256) == ("random", "test", given.sha256)
    line = measured.describe()
    assert "\n" not in line
    for part in (f"{measured.value:.2f}", "random", "split test", "5 windows of 24", "stride 24", "115 tokens"):
        assert part in line


def test_the_size_of_a_chunk_of_logits_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, given = tiny_llama(), disturbed(tiny_llama()), windows()
    whole = compare_language_models(model, other, given, batch_size=2)
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 7 * VOCABULARY)
    sizes = []
    chunks = LogitReader.chunks

    def watched(self: LogitReader, query, size):  # type: ignore[no-untyped-def]
        for logits in chunks(self, query, size):
            sizes.append(logits.shape[0])
            yield logits

    monkeypatch.setattr(LogitReader, "chunks", watched)
    cut = compare_language_models(model, other, given, batch_size=2)
    assert max(sizes) == 7
    assert cut.compressed.nll == pytest.approx(whole.compressed.nll, rel=1e-6)
    assert cut.agreement.kl == pytest.approx(whole.agreement.kl, rel=1e-4)
    assert cut.agreement.top1 == whole.agreement.top1


@pytest.mark.parametrize(
    ("config", "options", "by_head"),
    [
        ("LlamaConfig", {}, True),
        ("GPT2Config", {"n_positions": 64}, True),
        ("OPTConfig", {"ffn_dim": 32, "word_embed_proj_dim": 8, "pad_token_id": 1}, True),
        ("BartConfig", BART_DECODER, True),
        ("Gemma2Config", SOFT_CAPPED | {"final_logit_softcapping": 0.5}, False),
        ("Gemma2Config", SOFT_CAPPED | {"final_logit_softcapping": None}, True),
        ("CohereConfig", {"logit_scale": 0.25, "pad_token_id": 0}, False),
        ("CohereConfig", {"logit_scale": 1.0, "pad_token_id": 0}, True),
        ("GraniteConfig", {"logits_scaling": 3.0, "pad_token_id": 0}, False),
    ],
)
def test_logits_come_from_the_head_alone_only_where_that_is_exact(
    config: str, options: dict[str, object], by_head: bool
) -> None:
    model = build("AutoModelForCausalLM", config, scale=4.0, **options)
    given = windows(2)
    with evaluating(model):
        assert LogitReader(model, given.batches(1)[0]).by_head is by_head
    nll = -reference_log_probabilities(model, given).gather(-1, given.input_ids[:, 1:, None]).mean()
    assert perplexity(model, given).nll == pytest.approx(float(nll), rel=1e-5)


def test_the_probe_finds_a_change_of_the_logits_that_no_setting_names() -> None:
    model = tiny_llama()
    original = model.forward

    def halved(*args: object, **options: object) -> object:
        output = original(*args, **options)
        output.logits = output.logits / 2
        return output

    model.forward = halved
    with evaluating(model):
        assert not LogitReader(model, windows().batches(1)[0]).by_head


def test_padding_is_neither_predicted_nor_read() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    lines = ["some text", "a much longer piece of text", "x"]
    together = perplexity(model, tokenize_documents(lines, tokenizer, seq_len=30), batch_size=3)
    alone = [perplexity(model, tokenize_documents([line], tokenizer, seq_len=30)) for line in lines]
    assert together.tokens == sum(part.tokens for part in alone) == sum(len(line) + 1 for line in lines)
    total = sum(part.nll * part.tokens for part in alone)
    assert together.nll == pytest.approx(total / together.tokens, rel=1e-5)


def test_a_model_agrees_with_itself() -> None:
    model = tiny_llama()
    result = compare_language_models(model, model, windows())
    assert (result.agreement.kl, result.agreement.kl_p99, result.agreement.top1) == (0.0, 0.0, 1.0)
    assert result.dense == result.compressed == perplexity(model, windows())


def test_agreement_is_that_of_the_whole_distributions() -> None:
    dense, compressed, given = tiny_llama(), disturbed(tiny_llama()), windows()
    p, q = (reference_log_probabilities(model, given) for model in (dense, compressed))
    kl = (p.exp() * (p - q)).sum(-1).flatten()
    result = compare_language_models(dense, compressed, given, batch_size=2)
    assert result.agreement.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert result.agreement.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-3)
    assert result.agreement.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert 0 < result.agreement.top1 < 1
    assert result.agreement.tokens == 115
    assert result.dense == perplexity(dense, given, 2)
    assert result.compressed == perplexity(compressed, given, 2)
    assert f"{100 * result.agreement.top1:.2f} %" in result.agreement.describe()


def test_each_model_runs_once_over_the_windows() -> None:
    models, given = [tiny_llama(), disturbed(tiny_llama())], windows()
    calls = [0, 0]
    for index, model in enumerate(models):
        layer = model.model.layers[0]
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    compare_language_models(models[0], models[1], given)
    probes = 2  # once through the model and once through its body
    assert calls == [given.samples + probes] * 2


def test_kl_divergence_of_logits_that_forbid_a_token() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    assert kl_divergence(logits, logits).item() == 0.0
    assert kl_divergence(logits, torch.tensor([[0.0, 1.0, -1.0]])).item() > 0
    assert kl_divergence(torch.tensor([[0.0, 1.0, -1.0]]), logits).item() == torch.inf


def test_evaluation_mode_is_used_and_every_module_goes_back_to_its_own() -> None:
    model = tiny_llama(attention_dropout=0.5)
    expected = perplexity(model, windows()).value
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert perplexity(model, windows()).value == expected
    assert [module.training for module in model.modules()] == before
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    with pytest.raises(DataError, match="seq_len 100"):
        perplexity(model, windows(1, 100))
    assert [module.training for module in model.modules()] == before


def test_no_gradient_is_recorded_and_parameters_keep_asking_for_one() -> None:
    model = tiny_llama()
    perplexity(model, windows(1))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_bfloat16_is_close_to_float32() -> None:
    model = tiny_llama()
    exact = perplexity(model, windows()).nll
    half = model.to(torch.bfloat16)
    with evaluating(half):
        assert LogitReader(half, windows().batches(1)[0]).by_head
    assert perplexity(half, windows()).nll == pytest.approx(exact, rel=0.05)


def test_progress_counts_batches() -> None:
    seen: list[tuple[str, int, int]] = []
    perplexity(tiny_llama(), windows(5), 2, lambda label, done, total: seen.append((label, done, total)))
    assert seen == [("perplexity", 1, 3), ("perplexity", 2, 3), ("perplexity", 3, 3)]


def test_a_perplexity_beyond_a_float_is_infinite() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity(model, windows(1)).value == math.inf


def test_broken_or_unlike_models_are_refused() -> None:
    model, broken = tiny_llama(), tiny_llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="logits of LlamaForCausalLM are NaN in batch 1"):
        perplexity(broken, windows())
    with pytest.raises(ModelError, match="NaN"):
        compare_language_models(model, broken, windows())
    with pytest.raises(DataError, match=f"with {VOCABULARY} and {VOCABULARY + 3} logits"):
        compare_language_models(model, tiny_llama(vocab_size=VOCABULARY + 3), windows())
    with pytest.raises(DataError, match="seq_len 100"):
        perplexity(model, windows(1, 100))


def test_text_without_a_token_to_predict_is_refused() -> None:
    ids = torch.tensor([[5, 0, 0]])
    with pytest.raises(DataError, match="no token to predict"):
        perplexity(tiny_llama(), TokenWindows.from_ids(ids, torch.tensor([[1, 0, 0]])))


def test_a_model_with_a_layer_missing_is_still_measured() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp = nn.Identity()
    assert math.isfinite(perplexity(model, windows()).value)
