"""``ffsplit bench`` on tiny models: what it reports and refuses, never how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ffsplit.bench import caches
from ffsplit.bench.fillings import own, without_ffns
from ffsplit.bench.loaded import load
from ffsplit.bench.run import bench, token_counts
from ffsplit.bench.static_decode import StaticDecode
from ffsplit.bench.subject import check_same_shapes, open_subject
from ffsplit.bench.whole import made_up_ids
from ffsplit.errors import CheckpointError, DataError, ModelError
from ffsplit.families.find import find_ffns
from tests.tiny import tiny
from tests.unit.cli_fixtures import SIZES, Call, saved
from tests.unit.evaluate_helpers import tiny_llama
from tests.unit.test_bad_input import check_refused, copied

CPU = torch.device("cpu")
QUICK = {"device": "cpu", "rounds": 1, "peers": False}


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is spent on emptying real caches and on large products."""
    monkeypatch.setattr(caches, "MOST_BYTES", 4096)
    monkeypatch.setattr("ffsplit.bench.roofline.GEMM_SIZE", {"cpu": 8})


def test_a_dense_model_is_told_the_best_that_ffns_could_give(llama: Path) -> None:
    found = bench(str(llama), tokens=[1, 8], **QUICK)  # type: ignore[arg-type]
    assert found.kind == "dense"
    (row,) = found.ffns
    assert (row.count, row.structure, row.first) == (2, "dense", "model.layers.0.mlp")
    assert [(timing.tokens, timing.seconds, timing.verdict) for timing in row.timings] == [
        (1, None, None),
        (8, None, None),
    ]
    assert [(phase.phase, phase.tokens) for phase in found.phases] == [("prefill", 8), ("decode", 1), ("decode", 8)]
    assert all(set(phase.seconds) == {"dense", "none"} and phase.speed is None for phase in found.phases)
    assert found.verdicts == []
    assert found.ffn_speeds() == {}


@pytest.mark.parametrize("against", [False, True])
@pytest.mark.parametrize("name", ["compressed", "pruned"])
def test_a_checkpoint_is_timed_beside_its_dense_model(
    request: pytest.FixtureRequest, llama: Path, name: str, against: bool
) -> None:
    place: Path = request.getfixturevalue(name)
    found = bench(str(place), against=str(llama) if against else None, tokens=[4], **QUICK)  # type: ignore[arg-type]
    (row,) = found.ffns
    assert row.shape["d_ff"] == SIZES["intermediate_size"]
    assert row.dense_bytes == 4 * 3 * SIZES["hidden_size"] * SIZES["intermediate_size"]
    assert row.stored_bytes < row.dense_bytes
    assert found.memory["bytes"] < found.memory["dense_bytes"]
    assert all(set(phase.seconds) == {"dense", "this", "none"} for phase in found.phases)
    assert found.ffn_speeds()[4] == pytest.approx(row.timings[0].dense_seconds / row.timings[0].seconds)
    assert ("rebuilt" in found.dense_ffns) is not against


def test_the_document_is_versioned_and_plain(compressed: Path) -> None:
    found = bench(str(compressed), tokens=[2], ffn_only=True, **QUICK)  # type: ignore[arg-type]
    document = json.loads(json.dumps(found.to_dict()))
    assert (document["format"], document["version"], document["phases"]) == ("ffsplit-bench", 1, [])
    assert {"hardware", "versions", "load_average"} <= set(document["provenance"])
    assert document["roofline"]["copy"] > 0


@pytest.mark.parametrize("name", ["bert", "t5", "bart", "gpt2", "vit", "whisper", "phi"])
def test_other_families(name: str, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path / name)
    found = bench(str(tmp_path / name), tokens=[4], **QUICK)  # type: ignore[arg-type]
    phases = {phase.phase for phase in found.phases}
    text = name not in ("vit", "whisper")
    assert phases == ({"prefill", "decode"} if name in ("gpt2", "phi") else {"prefill"} if text else set())
    assert any("not text" in note for note in found.notes) is not text


def test_models_are_left_as_they_were(compressed: Path) -> None:
    loaded = load(open_subject(str(compressed)), None, CPU, None)
    before = dict(loaded.model.named_modules())
    for variant in (variants := loaded.variants()).values():
        variant.ready()
    variants["this"].ready()
    assert dict(loaded.model.named_modules()) == before


def test_variants_differ_in_their_ffns_alone() -> None:
    model, ids = tiny("llama"), made_up_ids(1, 8)
    sites = find_ffns(model).sites
    dense, none = own(model, sites), without_ffns(model, sites)
    with torch.inference_mode():
        wanted = dense.ready()(ids).logits
        without = none.ready()(ids).logits
        assert torch.equal(dense.ready()(ids).logits, wanted)
    assert not torch.equal(without, wanted)
    for site in sites:
        model.get_submodule(site.down).weight.data.zero_()
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, without)


def test_a_fixed_cache_decodes_what_a_growing_one_does() -> None:
    model, prompt = tiny("llama"), made_up_ids(2, 6)
    with torch.inference_mode():
        decoder = StaticDecode(model, prompt, new_tokens=5, graph=False)
        found, again = decoder.tokens(), decoder.tokens()
        ids = prompt
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids[:, 7:])
    assert torch.equal(found, again)


def test_default_counts_beyond_the_positions_are_left_out_with_a_note(llama: Path) -> None:
    subject = open_subject(str(llama))
    assert token_counts(subject, None, ffn_only=False) == (
        [1, 16],
        ["128, 2,048 tokens were left out: the model has 64 positions"],
    )
    assert token_counts(subject, None, ffn_only=True) == ([1, 16, 128, 2048], [])


def test_a_given_count_beyond_the_positions_is_refused(llama: Path) -> None:
    with pytest.raises(DataError, match=r"--tokens 65: .* has 64 positions"):
        bench(str(llama), tokens=[1, 65], **QUICK)  # type: ignore[arg-type]


def test_a_checkpoint_without_a_plan_is_measured_all_the_same(compressed: Path, tmp_path: Path) -> None:
    bare = copied(compressed, tmp_path)
    (bare / "ffsplit_plan.json").unlink()
    subject = open_subject(str(bare))
    assert subject.kind == "ffsplit"
    assert subject.dense == open_subject(str(compressed)).dense


def test_a_damaged_plan_is_refused(compressed: Path, tmp_path: Path) -> None:
    broken = copied(compressed, tmp_path)
    (broken / "ffsplit_plan.json").write_text('{"ffns": [{}]}')
    with pytest.raises(CheckpointError, match=r"ffsplit_plan\.json: damaged"):
        open_subject(str(broken))


def test_another_vocabulary_is_refused(compressed: Path, tmp_path: Path) -> None:
    other = saved(tiny_llama(**SIZES, vocab_size=300), tmp_path / "other", tokenizer=False)
    with pytest.raises(ModelError, match=r"a vocabulary of 300, .* of 261"):
        check_same_shapes(open_subject(str(compressed)), open_subject(str(other)))


def test_command(cli: Call, compressed: Path, llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "bench.json"
    told = cli("bench", compressed, "--against", llama, "--tokens", "1,4", "--rounds", 1, "--device", "cpu", "-o", file)
    assert told.code == 0, told.err
    for words in ("FFNs", "Whole model", "Memory", "copy bandwidth", "best possible", "Other storages"):
        assert words in told.out
    written = json.loads(file.read_text())
    assert written["settings"]["tokens"] == [1, 4]
    assert all(f"! {verdict}" in told.out for verdict in written["verdicts"])


def test_command_json(cli: Call, llama: Path) -> None:
    told = cli("bench", llama, "--ffn-only", "--tokens", 2, "--rounds", 1, "--no-peers", "--device", "cpu", "--json")
    assert told.document["format"] == "ffsplit-bench"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tokens", "0"), "--tokens '0': must be a whole number of at least 1"),
        (("--tokens", "1,x"), "--tokens 'x'"),
        (("--tokens", ","), "name at least one"),
        (("--tokens", "1000"), "has 64 positions"),
        (("--device", "cuda:99"), "--device 'cuda:99'"),
        (("--dtype", "float7"), "--dtype 'float7'"),
        (("--against", "./nothing"), "./nothing"),
        (("--out", "/proc/nothing/bench.json"), "cannot be written"),
    ],
)
def test_what_the_command_refuses(cli: Call, llama: Path, options: tuple[str, ...], words: str) -> None:
    check_refused(cli("bench", llama, *options), words)


def test_the_command_refuses_other_shapes_and_folders(cli: Call, llama: Path, compressed: Path, tmp_path: Path) -> None:
    wide = saved(tiny_llama(hidden_size=32, intermediate_size=96), tmp_path / "wide", tokenizer=False)
    deep = saved(tiny_llama(**SIZES, num_hidden_layers=3), tmp_path / "deep", tokenizer=False)
    check_refused(cli("bench", compressed, "--against", wide), "d_ff 96", "d_ff 64")
    check_refused(cli("bench", compressed, "--against", deep), "has 3 FFNs", "has 2")
    check_refused(cli("bench", compressed, "--against", compressed), "is itself compressed")
    check_refused(cli("bench", llama, "--against", llama), "is dense itself")
    (tmp_path / "empty").mkdir()
    check_refused(cli("bench", tmp_path / "empty"), "no config.json")
