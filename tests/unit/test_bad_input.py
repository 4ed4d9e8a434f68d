"""Inputs that cannot work: exit code 2, one message that helps, no traceback, nothing on stdout, nothing written."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ffsplit.cli import compress as command
from ffsplit.cli.main import main
from tests.unit.cli_fixtures import SIZES, SMALL, Call, Outcome, saved
from tests.unit.evaluate_helpers import build, tiny_llama


def check_refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    flat = " ".join(outcome.err.replace("│", " ").split())
    for word in words:
        assert word in flat, f"{word!r} is not in: {flat}"


def tiny_mixtral() -> PreTrainedModel:
    return build("AutoModelForCausalLM", "MixtralConfig", num_local_experts=4, num_key_value_heads=2)


def copied(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def test_missing_model(cli: Call, llama: Path, untouched: Path) -> None:
    wrong = llama.with_name("lama")
    check_refused(cli("compress", wrong, "--out", untouched), "no such file or folder", "did you mean", str(llama))


def test_missing_gguf_file(cli: Call, untouched: Path) -> None:
    check_refused(cli("compress", "model.gguf", "--out", untouched), "'model.gguf'", "no such file")


def test_folder_without_config(cli: Call, tmp_path: Path, untouched: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_refused(cli("compress", tmp_path / "empty", "--out", untouched), "config.json")


def test_text_file_as_model(cli: Call, text: Path, untouched: Path) -> None:
    check_refused(cli("compress", text, "--out", untouched), "text.txt", "hub id, a folder or a .gguf file")


def test_file_that_only_ends_in_gguf(cli: Call, tmp_path: Path, untouched: Path) -> None:
    (tmp_path / "model.gguf").write_text("not a model")
    check_refused(cli("compress", tmp_path / "model.gguf", "--out", untouched), "model.gguf")


def test_config_that_is_not_json(cli: Call, llama: Path, tmp_path: Path, untouched: Path) -> None:
    broken = copied(llama, tmp_path)
    (broken / "config.json").write_text("{ hidden_size: ")
    check_refused(cli("compress", broken, "--out", untouched), "JSON")


def test_unknown_recipe(cli: Call, llama: Path, untouched: Path) -> None:
    check_refused(
        cli("compress", llama, "--out", untouched, "--recipe", "ffspilt"), "ffspilt", "did you mean 'ffsplit'"
    )


def test_missing_recipe_file(cli: Call, llama: Path, untouched: Path) -> None:
    check_refused(cli("compress", llama, "--out", untouched, "--recipe", "mine.yaml"), "mine.yaml does not exist")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("method: {method: ffsplit, keap: 0.5}", ("unknown key", "keap", "did you mean 'keep'")),
        ("method: ffsplit\npropagade: false", ("propagade", "did you mean 'propagate'")),
        ("method: prune", ("keep",)),
        ("method: {method: prune, keep: 0.5, score: loudness}", ("score", "loudness")),
        ("overrides: []", ("method",)),
        ("- a\n- b", ("mapping",)),
        ("method: [", ("YAML",)),
    ],
)
def test_bad_recipe(
    cli: Call, llama: Path, tmp_path: Path, untouched: Path, content: str, words: tuple[str, ...]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    check_refused(cli("compress", llama, "--out", untouched, "--recipe", recipe), *words)


@pytest.mark.parametrize("keep", ["0", "-0.5", "1.5", "nan"])
def test_keep_out_of_range(cli: Call, llama: Path, untouched: Path, keep: str) -> None:
    check_refused(cli("compress", llama, "--out", untouched, "--keep", keep), "--keep", "above 0 and at most 1")


@pytest.mark.parametrize("bits", ["0", "-3", "17", "nan"])
def test_bits_out_of_range(cli: Call, llama: Path, untouched: Path, bits: str) -> None:
    check_refused(cli("compress", llama, "--out", untouched, "--bits", bits), "--bits", "above 0 and at most 16")


def test_two_budgets(cli: Call, llama: Path, untouched: Path) -> None:
    check_refused(
        cli("compress", llama, "--out", untouched, "--keep", "0.5", "--bits", "4"), "--keep", "--bits", "not both"
    )


def test_budget_of_another_kind(cli: Call, llama: Path, untouched: Path) -> None:
    check_refused(cli("compress", llama, "--out", untouched, "--recipe", "svd", "--bits", "4"), "svd", "bits", "keep")


def test_budget_out_of_reach_names_the_layer_and_the_smallest(cli: Call, llama: Path, untouched: Path) -> None:
    outcome = cli("compress", llama, "--out", untouched, "--bits", "1", *SMALL)
    check_refused(outcome, "model.layers.0.mlp", "smallest reachable")


def test_keep_out_of_reach(cli: Call, llama: Path, untouched: Path) -> None:
    outcome = cli("compress", llama, "--out", untouched, "--recipe", "svd", "--keep", "0.001", *SMALL)
    check_refused(outcome, "model.layers.0.mlp", "smallest reachable keep")


@pytest.mark.parametrize(
    ("option", "value"), [("--samples", "0"), ("--seq-len", "1"), ("--batch-size", "0"), ("--samples", "many")]
)
def test_numbers_that_are_none(cli: Call, llama: Path, untouched: Path, option: str, value: str) -> None:
    check_refused(cli("compress", llama, "--out", untouched, option, value), f"Invalid value for '{option}'")


def test_unknown_option(cli: Call, llama: Path, untouched: Path) -> None:
    check_refused(cli("compress", llama, "--out", untouched, "--sample", "3"), "--sample", "--samples")


def test_unknown_command(cli: Call) -> None:
    check_refused(cli("compres"), "compres", "compress")


def test_output_is_required(cli: Call, llama: Path) -> None:
    check_refused(cli("compress", llama), "--out")


def test_existing_output(cli: Call, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    check_refused(cli("compress", llama, "--out", tmp_path / "out"), "exists and is not empty", "--overwrite")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_output_that_is_a_mount_point(cli: Call, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "volume"
    out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self == out.resolve())
    check_refused(cli("compress", llama, "--out", out), "is a mount point", "a directory in it")
    assert list(out.iterdir()) == []


def test_output_that_is_a_file(cli: Call, llama: Path, text: Path) -> None:
    before = text.read_text()
    check_refused(cli("compress", llama, "--out", text), "not a directory")
    check_refused(cli("compress", llama, "--out", text / "out"), "is a file")
    assert text.read_text() == before


def test_parent_that_cannot_be_written_to(
    cli: Call, llama: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)  # the tests may run as root, who may write anywhere
    check_refused(cli("compress", llama, "--out", untouched), str(untouched.parent), "Permission denied")


def test_cache_directory_that_cannot_be_made(cli: Call, llama: Path, text: Path, untouched: Path) -> None:
    check_refused(cli("compress", llama, "--out", untouched, "--cache-dir", text / "cache"), "is a file")


def test_missing_calibration_file(cli: Call, llama: Path, text: Path, untouched: Path) -> None:
    wrong = text.with_name("txet.txt")
    check_refused(cli("compress", llama, "--out", untouched, "--calibration", wrong), "no such file", "did you mean")


def test_empty_calibration_file(cli: Call, llama: Path, tmp_path: Path, untouched: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    outcome = cli("compress", llama, "--out", untouched, "--calibration", tmp_path / "empty.txt")
    check_refused(outcome, "empty.txt", "holds no text")


def test_calibration_that_is_not_text(cli: Call, llama: Path, tmp_path: Path, untouched: Path) -> None:
    (tmp_path / "photo.txt").write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)))
    check_refused(
        cli("compress", llama, "--out", untouched, "--calibration", tmp_path / "photo.txt"), "photo.txt", "UTF-8"
    )


def test_too_little_text(cli: Call, llama: Path, tmp_path: Path, untouched: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    outcome = cli("compress", llama, "--out", untouched, "--calibration", tmp_path / "short.txt", *SMALL)
    check_refused(outcome, "short.txt", "10 tokens", "seq_len 32")


def test_wrong_field(cli: Call, llama: Path, tmp_path: Path, untouched: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"sentence": "some words " * 100}) + "\n")
    outcome = cli(
        "compress", llama, "--out", untouched, "--calibration", tmp_path / "rows.jsonl", "--field", "sentense"
    )
    check_refused(outcome, "sentense", "sentence")


def test_windows_longer_than_the_model(cli: Call, llama: Path, untouched: Path) -> None:
    check_refused(
        cli("compress", llama, "--out", untouched, "--seq-len", "100", "--samples", "2"), "100", "64 positions"
    )


def test_tokenizer_of_another_model(cli: Call, tmp_path: Path, untouched: Path) -> None:
    small = saved(tiny_llama(**SIZES, vocab_size=40), tmp_path / "small")
    check_refused(cli("compress", small, "--out", untouched, *SMALL), "40", "tokenizer does not belong to this model")


def test_no_tokenizer(cli: Call, tmp_path: Path, untouched: Path) -> None:
    silent = saved(tiny_llama(**SIZES), tmp_path / "silent", tokenizer=False)
    check_refused(cli("compress", silent, "--out", untouched, *SMALL), "tokenizer")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(cli: Call, llama: Path, tmp_path: Path, untouched: Path, value: float) -> None:
    broken = copied(llama, tmp_path)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    check_refused(
        cli("compress", broken, "--out", untouched, *SMALL), "model.layers.1.mlp.up_proj.weight", "NaN or infinite"
    )


def test_truncated_weights(cli: Call, llama: Path, tmp_path: Path, untouched: Path) -> None:
    broken = copied(llama, tmp_path)
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    check_refused(cli("compress", broken, "--out", untouched, *SMALL), "incomplete metadata, file not fully covered")


def test_missing_weights(cli: Call, llama: Path, tmp_path: Path, untouched: Path) -> None:
    broken = copied(llama, tmp_path)
    (broken / "model.safetensors").unlink()
    check_refused(cli("compress", broken, "--out", untouched, *SMALL), str(broken), "model.safetensors")


def test_already_compressed(cli: Call, compressed: Path, untouched: Path) -> None:
    check_refused(cli("compress", compressed, "--out", untouched, *SMALL), "already compressed", "decompress")


def test_compressed_by_something_else(cli: Call, llama: Path, tmp_path: Path, untouched: Path) -> None:
    other = copied(llama, tmp_path)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (other / "config.json").write_text(json.dumps(config))
    check_refused(cli("compress", other, "--out", untouched, *SMALL), "already compressed", "gptq")


def test_experts(cli: Call, tmp_path: Path, untouched: Path) -> None:
    model = saved(tiny_mixtral(), tmp_path / "mixtral")
    check_refused(cli("compress", model, "--out", untouched, *SMALL), "mixture-of-experts", "4 experts", "%")


def test_model_without_ffn(cli: Call, tmp_path: Path, untouched: Path) -> None:
    torch.manual_seed(0)
    empty = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=261, num_hidden_layers=0, num_attention_heads=2))
    model = saved(empty, tmp_path / "hollow")
    check_refused(cli("compress", model, "--out", untouched, *SMALL), "no FFN found", "Embedding")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cpu0"])
def test_unknown_device(cli: Call, llama: Path, untouched: Path, device: str) -> None:
    check_refused(
        cli("compress", llama, "--out", untouched, "--device", device), "--device", device, "this machine has cpu"
    )


@pytest.mark.parametrize("dtype", ["float8", "int8", "bf16"])
def test_unknown_dtype(cli: Call, llama: Path, untouched: Path, dtype: str) -> None:
    check_refused(cli("compress", llama, "--out", untouched, "--dtype", dtype), dtype, "float32, float16, bfloat16")


def test_full_disk(cli: Call, llama: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(untouched))

    monkeypatch.setattr("ffsplit.checkpoint.save._write", full)
    outcome = cli("compress", llama, "--out", untouched, "--recipe", "svd", "--keep", "0.5", *SMALL)
    check_refused(outcome, "No space left")
    shutil.rmtree(untouched.parent / "out.ffsplit-journal")  # kept on purpose: repeating the command resumes


def test_interruption_keeps_the_journal_and_says_so(
    cli: Call, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("compress", llama, "--out", tmp_path / "out", "--recipe", "svd", "--keep", "0.5", "--json", *SMALL)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ffsplit.checkpoint.save.save", interrupted)
        outcome = cli(*run)
    assert outcome.code == 130
    assert "repeat the same command" in outcome.err
    assert not (tmp_path / "out").exists()
    resumed = cli(*run)
    assert "resuming: 2 FFNs" in resumed.err
    assert len(resumed.document["report"]["layers"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_journal_of_another_run(cli: Call, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ("compress", llama, "--out", tmp_path / "out", "--recipe", "svd", *SMALL)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ffsplit.checkpoint.save.save", interrupted)
        assert cli(*run, "--keep", "0.5").code == 130
    check_refused(cli(*run, "--keep", "0.6"), "out.ffsplit-journal", "recipe")


def test_a_bug_keeps_its_traceback(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(command.checks, "check_output", broken)
    with pytest.raises(ZeroDivisionError) as failure:
        main(["compress", str(llama), "--out", str(tmp_path / "out")])
    assert "report it" in failure.value.__notes__[0]


def test_debugging_shows_the_traceback(cli: Call, untouched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFSPLIT_DEBUG", "1")
    outcome = cli("compress", "./nowhere", "--out", untouched)
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert "no such file or folder" in outcome.err
