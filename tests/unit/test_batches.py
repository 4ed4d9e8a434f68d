from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ffsplit.calibrate.batches import is_causal, make_batches, make_windows
from ffsplit.calibrate.tokens import TokenWindows
from ffsplit.errors import DataError
from tests.tiny import tiny
from tests.unit.evaluate_helpers import byte_tokenizer, tiny_bert, tiny_llama
from tests.unit.family_batches import padding_mask, token_ids

TOKENIZER = byte_tokenizer()
SIZES = {"seq_len": 8, "samples": 3, "batch_size": 2}
TEXTS = ["The quick brown fox jumps over the lazy dog.", "Hello.", "A third text of some length."]


def test_causal_models_get_contiguous_windows() -> None:
    made = make_batches(tiny_llama(), TOKENIZER, TEXTS, **SIZES)
    assert [list(batch) for batch in made.batches] == [["input_ids"], ["input_ids"]]
    assert [tuple(batch["input_ids"].shape) for batch in made.batches] == [(2, 8), (1, 8)]
    joined = torch.cat([batch["input_ids"].flatten() for batch in made.batches])
    assert TOKENIZER.decode(joined) == TEXTS[0][:24]
    assert made.describe() == {"source": "texts", "sha256": made.sha256, "samples": 3, "tokens": 24}


def test_encoders_get_masked_documents() -> None:
    made = make_batches(tiny_bert(), TOKENIZER, TEXTS, **SIZES)
    first, second = made.batches
    assert first["attention_mask"].sum(1).tolist() == [8, 8]
    assert second["attention_mask"].sum(1).tolist() == [8]
    wide = make_batches(tiny_bert(), TOKENIZER, TEXTS, seq_len=16, samples=3, batch_size=3)
    assert wide.batches[0]["attention_mask"].sum(1).tolist() == [16, 8, 16]
    assert wide.tokens == 40
    assert (wide.batches[0]["input_ids"][1, 8:] == TOKENIZER.pad_token_id).all()


def test_an_encoder_decoder_reads_the_same_text_on_both_sides() -> None:
    model = tiny("bart")
    mask = padding_mask(6, 4, columns=6)
    windows = TokenWindows.from_ids(token_ids(2, 6), mask)
    (batch,) = make_batches(model, None, windows, **SIZES).batches
    assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["input_ids"][:, :-1])
    assert batch["decoder_input_ids"][:, 0].tolist() == [model.config.decoder_start_token_id] * 2
    assert torch.equal(batch["decoder_attention_mask"], mask)
    (plain,) = make_batches(model, None, token_ids(2, 6), **SIZES).batches
    assert set(plain) == {"input_ids", "decoder_input_ids"}


def test_an_encoder_decoder_without_a_start_token() -> None:
    model = tiny("bart")
    model.config.decoder_start_token_id = None
    (batch,) = make_batches(model, None, token_ids(1, 6), **SIZES).batches
    assert int(batch["decoder_input_ids"][0, 0]) == model.config.bos_token_id
    model.config.bos_token_id = None
    (batch,) = make_batches(model, None, token_ids(1, 6), **SIZES).batches
    assert int(batch["decoder_input_ids"][0, 0]) == 0


def test_the_encoder_of_an_encoder_decoder_gets_no_decoder_inputs() -> None:
    model = tiny("t5-encoder")
    (batch,) = make_batches(model, None, token_ids(1, 6), **SIZES).batches
    model(**batch)
    assert set(batch) == {"input_ids"}


def test_ids_keep_their_length_and_samples_cut_them() -> None:
    made = make_batches(tiny("llama"), None, token_ids(5, 11), **SIZES)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in made.batches]), token_ids(5, 11)[:3])
    assert (made.samples, made.tokens, made.name) == (3, 33, "token ids")
    again = make_batches(tiny("llama"), None, token_ids(3, 11), **SIZES)
    other = make_batches(tiny("llama"), None, token_ids(3, 11, seed=1), **SIZES)
    assert (again.sha256 == made.sha256) != (other.sha256 == made.sha256)


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abcdefgh" * 4)
    made = make_batches(tiny_llama(), TOKENIZER, str(file), **SIZES)
    assert (made.name, made.samples) == ("text.txt", 3)


def test_ready_made_batches_are_taken_as_they_are() -> None:
    mask = padding_mask(6, 4, columns=6)
    given = [{"input_ids": token_ids(2, 6), "attention_mask": mask}, {"input_ids": token_ids(1, 6, seed=1)}]
    made = make_batches(tiny("bert"), None, given, **SIZES)
    assert [set(batch) for batch in made.batches] == [set(batch) for batch in given]
    assert (made.name, made.samples, made.windows) == ("batches", 3, None)
    assert made.tokens == 10 + 6, "padding is not a token"
    made.batches[0].clear()
    assert given[0], "the caller's batches are not touched"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ready_made_pixels_of_any_type(dtype: torch.dtype) -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    made = make_batches(tiny("vit"), None, [{"pixel_values": images}], **SIZES)
    assert made.batches[0]["pixel_values"].dtype == dtype
    assert (made.samples, made.tokens) == (2, images.numel())
    same = make_batches(tiny("vit"), None, [{"pixel_values": images.transpose(2, 3).contiguous().mT}], **SIZES)
    other = make_batches(tiny("vit"), None, [{"pixel_values": images + 1}], **SIZES)
    assert made.sha256 == same.sha256 != other.sha256


def test_batches_of_another_shape_or_type_are_other_batches() -> None:
    def sha256(*batches: torch.Tensor) -> str:
        return make_batches(tiny("bert"), None, [{"input_ids": ids} for ids in batches], **SIZES).sha256

    ids = token_ids(2, 6)
    others = (ids.reshape(3, 4), ids.reshape(1, 12), ids.flatten().view(torch.int32).reshape(2, 12))
    assert len({sha256(ids), sha256(*ids.split(1)), *map(sha256, others)}) == 5


def test_a_ready_made_batch_without_the_main_input() -> None:
    with pytest.raises(DataError, match="batch 1 has no 'pixel_values', the main input of ViTModel"):
        make_batches(tiny("vit"), None, [{"pixel_values": torch.zeros(1)}, {"pixels": torch.zeros(1)}], **SIZES)


@pytest.mark.parametrize(
    ("family", "source", "message"),
    [
        ("llama", TEXTS, "text needs a tokenizer"),
        ("llama", [], "tokenizer|no text|empty"),
        ("llama", torch.full((1, 4), 500), "token id 500 is outside the 128 rows"),
        ("llama", torch.zeros(1, 65, dtype=torch.long), "64 positions"),
        ("vit", torch.zeros(1, 4, dtype=torch.long), "ViTModel reads 'pixel_values', not text"),
    ],
)
def test_what_cannot_work(family: str, source: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_batches(tiny(family), None, source, **SIZES)  # type: ignore[arg-type]


def test_no_texts_at_all() -> None:
    with pytest.raises(DataError):
        make_batches(tiny_llama(), TOKENIZER, [], **SIZES)


def test_the_evaluation_split_is_other_text() -> None:
    options = {"seq_len": 16, "samples": 4}
    first = make_windows(tiny_llama(), TOKENIZER, "builtin", **options)
    second = make_windows(tiny_llama(), TOKENIZER, "builtin", split="evaluation", **options)
    assert (first.split, second.split) == ("calibration", "evaluation")
    assert first.sha256 != second.sha256


def test_what_counts_as_causal() -> None:
    kinds = {name: is_causal(tiny(name)) for name in ("llama", "gpt2", "bert", "t5", "bart", "vit", "t5-encoder")}
    assert kinds == {"llama": True, "gpt2": True} | dict.fromkeys(("bert", "t5", "bart", "vit", "t5-encoder"), False)
