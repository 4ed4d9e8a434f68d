from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BloomConfig

from ffsplit.calibrate import tokens as tokens_module
from ffsplit.calibrate.tokens import TokenWindows, check_fits, max_positions, tokenize_documents, tokenize_windows
from ffsplit.errors import DataError
from tests.unit.evaluate_helpers import VOCABULARY, build, byte_tokenizer, tiny_llama

TOKENIZER = byte_tokenizer()


def test_windows_hold_the_joined_text_in_order_and_nothing_else() -> None:
    windows = tokenize_windows(["hello world", "again"], TOKENIZER, seq_len=4)
    assert TOKENIZER.decode(windows.input_ids.flatten()) == "hello world\n\nagain"[:16]
    assert windows.input_ids.shape == (4, 4)
    assert (windows.tokens, windows.samples, windows.seq_len, windows.attention_mask) == (16, 4, 4, None)
    assert windows.name == "texts"
    assert windows.text_sha256 is not None


def test_samples_limit_the_windows_and_do_not_change_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.txt"
    path.write_text("".join(f"word{index} " for index in range(4000)))
    everything = tokenize_windows(path, TOKENIZER, seq_len=16)
    lengths = []
    original = tokens_module._ids
    monkeypatch.setattr(tokens_module, "_ids", lambda text, tok: lengths.append(len(text)) or original(text, tok))
    few = tokenize_windows(path, TOKENIZER, seq_len=16, samples=20)
    assert torch.equal(few.input_ids, everything.input_ids[:20])
    assert lengths[0] < path.stat().st_size / 4
    assert few.sha256 != everything.sha256
    assert few.sha256 == everything.first(20).sha256
    assert tokenize_windows(path, TOKENIZER, seq_len=16, samples=10**6).samples == everything.samples


def test_a_text_without_white_space_is_still_cut(tmp_path: Path) -> None:
    windows = tokenize_windows(["x" * 5000], TOKENIZER, seq_len=8, samples=2)
    assert TOKENIZER.decode(windows.input_ids.flatten()) == "x" * 16


def test_no_warning_that_the_text_is_longer_than_the_model_allows(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenize_windows(["word " * 100], byte_tokenizer(), seq_len=64)
    assert not caplog.records


def test_too_little_text_says_how_much_there_is_and_is_needed() -> None:
    with pytest.raises(DataError, match=r"'texts': 3 tokens of text, but one window needs seq_len 4"):
        tokenize_windows(["abc"], TOKENIZER, seq_len=4)


def test_documents_are_single_sequences_with_special_tokens_and_a_mask() -> None:
    windows = tokenize_documents(["a longer one", "abc"], TOKENIZER, seq_len=8)
    assert TOKENIZER.batch_decode(windows.input_ids) == ["<cls>a long<sep>", "<cls>abc<sep><pad><pad><pad>"]
    assert windows.attention_mask is not None
    assert windows.attention_mask.tolist() == [[1] * 8, [1] * 5 + [0] * 3]
    assert windows.tokens == 13


def test_a_text_file_gives_encoders_its_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  two  \nthree\n")
    windows = tokenize_documents(tmp_path / "a.txt", TOKENIZER, samples=2)
    assert TOKENIZER.batch_decode(windows.input_ids) == ["<cls>one<sep>", "<cls>two<sep>"]


def test_batches_cut_the_padding_that_a_batch_does_not_need() -> None:
    windows = tokenize_documents(["ab", "c", "a longer one"], TOKENIZER, seq_len=16)
    batches = windows.batches(2)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 4), (1, 14)]
    assert [int(batch["attention_mask"].sum()) for batch in batches] == [7, 14]
    plain = tokenize_windows(["x" * 20], TOKENIZER, seq_len=4).batches(2)
    assert [set(batch) for batch in plain] == [{"input_ids"}] * 3
    assert [len(batch["input_ids"]) for batch in plain] == [2, 2, 1]
    with pytest.raises(DataError, match="batch_size 0"):
        windows.batches(0)


def test_ids_are_taken_as_they_are_without_a_tokenizer() -> None:
    ids = torch.arange(12, dtype=torch.int32).view(3, 4)
    windows = tokenize_windows(ids, None, seq_len=2048, samples=2)
    assert torch.equal(windows.input_ids, ids[:2].long())
    assert tokenize_windows(windows, None) is windows
    assert windows.sha256 == TokenWindows.from_ids(ids[:2].long(), name="other").sha256
    assert windows.sha256 != TokenWindows.from_ids(ids[:2].view(4, 2)).sha256
    assert windows.sha256 != TokenWindows.from_ids(ids[:2], torch.ones(2, 4)).sha256


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), r"\[samples, seq_len\], not torch.int64 \[4\]"),
        (torch.zeros(2, 3), "not torch.float32"),
        (torch.zeros(0, 3, dtype=torch.int64), r"\[0, 3\]"),
        (torch.tensor([[1, -1]]), "must not be negative, the smallest is -1"),
    ],
)
def test_bad_ids(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize_windows(ids, None)


def test_bad_arguments() -> None:
    with pytest.raises(DataError, match="needs a tokenizer"):
        tokenize_windows(["text"], None, seq_len=2)
    with pytest.raises(DataError, match="seq_len 1"):
        tokenize_windows(["text"], TOKENIZER, seq_len=1)
    with pytest.raises(DataError, match="samples 0"):
        tokenize_documents(["text"], TOKENIZER, samples=0)
    with pytest.raises(DataError, match=r"the mask is \[1, 2\]"):
        TokenWindows.from_ids(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 2))
    with pytest.raises(DataError, match="samples 5: token ids has 1"):
        TokenWindows.from_ids(torch.zeros(1, 3, dtype=torch.int64)).first(5)


def test_ids_outside_the_embedding_are_refused() -> None:
    model = tiny_llama()
    check_fits(TokenWindows.from_ids(torch.tensor([[0, VOCABULARY - 1]])), model)
    with pytest.raises(DataError, match=rf"id {VOCABULARY} is outside the {VOCABULARY} rows .* LlamaForCausalLM"):
        check_fits(TokenWindows.from_ids(torch.tensor([[0, VOCABULARY]])), model)


def test_sequences_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(DataError, match="seq_len 65: LlamaForCausalLM has 64 positions"):
        check_fits(TokenWindows.from_ids(torch.zeros(1, 65, dtype=torch.int64)), tiny_llama())


@pytest.mark.parametrize("family", ["RobertaConfig", "MPNetConfig", "BertConfig", "GPT2Config", "OPTConfig"])
def test_the_longest_sequence_that_is_allowed_really_runs(family: str) -> None:
    model = build("AutoModel", family, pad_token_id=1, n_positions=64, ffn_dim=32, word_embed_proj_dim=16)
    limit = max_positions(model)
    assert limit == (62 if family in ("RobertaConfig", "MPNetConfig") else 64)
    assert model(torch.full((1, limit), 5)).last_hidden_state.shape[1] == limit
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, limit + 1), 5))


def test_a_model_without_a_limit_has_none() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "n_head": 2, "n_layer": 1}
    assert max_positions(AutoModel.from_config(BloomConfig(**sizes))) is None


def test_a_model_that_does_not_read_text_is_refused() -> None:
    vit = build("AutoModel", "ViTConfig", image_size=8, patch_size=4)
    with pytest.raises(DataError, match="ViTModel reads 'pixel_values', not text"):
        check_fits(TokenWindows.from_ids(torch.zeros(1, 4, dtype=torch.int64)), vit)
