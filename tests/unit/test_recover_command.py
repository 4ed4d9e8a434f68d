"""``ffsplit recover``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ffsplit.errors import ModelError
from tests.unit.cli_fixtures import Call

FAST = ("--steps", "3", "--seq-len", "32", "--batch-size", "4", "--device", "cpu", "--lr", "1e-4")


@pytest.mark.parametrize("kind", ["compressed", "pruned"])
def test_a_checkpoint_is_recovered(
    kind: str, llama: Path, text: Path, cli: Call, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    out = tmp_path / "out"
    done = cli("recover", folder, "--teacher", llama, "--data", text, "--out", out, *FAST, "--json")
    assert done.code == 0, done.err
    stage = done.document["recovery"]["stages"][0]
    assert stage["steps"] == 3
    before, after = json.loads((folder / "config.json").read_text()), json.loads((out / "config.json").read_text())
    assert before.get("quantization_config") == after.get("quantization_config")
    assert before["intermediate_size"] == after["intermediate_size"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all()
    assert not list(tmp_path.glob("*journal*"))
    again = cli("recover", out, "--teacher", llama, "--data", text, "--out", tmp_path / "twice", *FAST)
    assert again.code == 0, again.err
    assert "held-out" in again.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stage", "wibble"), "stages"),
        (("--stage", "blocks"), "give the teacher"),
        (("--teacher", "/no/such/model"), "no such file or folder"),
        (("--data", "/no/such/text.txt"), "no such file or folder"),
        (("--lr", "7"), "lr"),
        (("--stage", "masks"), "needs keep"),
        (("--keep", "0.3"), "needs keep"),
        (("--stage", "masks", "--keep", "0.9"), "more than the FFNs have left"),
        (("--stage", "masks", "--keep", "0.3", "--steps", "2"), "too few"),
        (("--low-bit", "codes", "--lora", "2"), "choose one"),
        (("--lora", "4", "--train", "all"), "choose one"),
        (("--seq-len", "100000"), "seq_len"),
    ],
)
def test_bad_input_is_refused(options: tuple[str, ...], message: str, pruned: Path, cli: Call, untouched: Path) -> None:
    done = cli("recover", pruned, "--out", untouched, "--device", "cpu", *options)
    assert done.code == 2
    assert message in done.err


def test_a_refusal_after_the_folder_was_taken_leaves_no_journal(
    llama: Path, pruned: Path, cli: Call, untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> None:
        raise ModelError("no such stage")

    monkeypatch.setattr("ffsplit.recover.run._stage", refuse)
    done = cli("recover", pruned, "--teacher", llama, "--out", untouched, *FAST)
    assert done.code == 2
    assert "no such stage" in done.err


@pytest.mark.parametrize("kind", ["llama", "pruned"])
@pytest.mark.parametrize("scope", ["model", "ffn"])
def test_masks_make_a_model_narrower(
    kind: str, scope: str, llama: Path, text: Path, cli: Call, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    out = tmp_path / "out"
    options = ("--stage", "masks,refit", "--keep", "0.4", "--scope", scope, *FAST, "--steps", "6")
    teacher = ("--teacher", llama) if kind == "pruned" else ()
    done = cli("recover", folder, *teacher, "--data", text, "--out", out, *options)
    assert done.code == 0, done.err
    assert "FFN parameters kept" in done.out
    report = json.loads((out / "ffsplit_report.json").read_text())
    assert 0.38 < report["budget"]["keep_ffn"] <= 0.4
    small, dense = load_file(out / "model.safetensors"), load_file(llama / "model.safetensors")
    sizes = [sum(tensor.numel() for tensor in tensors.values()) for tensors in (small, dense)]
    assert report["budget"]["keep_model"] == pytest.approx(sizes[0] / sizes[1])
    config = json.loads((out / "config.json").read_text())
    assert ("quantization_config" in config) == (len(set(report["recovery"]["stages"][0]["widths"].values())) > 1)
    if scope == "ffn":
        assert config["intermediate_size"] == 25
    again = cli("recover", out, "--teacher", llama, "--data", text, "--out", tmp_path / "twice", *FAST)
    assert again.code == 0, again.err


def test_a_plain_model_is_refused(llama: Path, cli: Call, untouched: Path) -> None:
    done = cli("recover", llama, "--teacher", llama, "--out", untouched, "--device", "cpu")
    assert done.code == 2
    assert "ffsplit_plan.json" in done.err


def test_masks_on_low_bit_ffns_and_with_a_strange_teacher_are_refused(
    compressed: Path, llama: Path, bert: Path, cli: Call, untouched: Path
) -> None:
    for folder, teacher, message in (
        (compressed, llama, "dense or pruned FFNs alone"),
        (llama, bert, "its own teacher"),
    ):
        options = ("--stage", "masks", "--keep", "0.3", "--out", untouched, "--device", "cpu")
        done = cli("recover", folder, "--teacher", teacher, *options)
        assert done.code == 2
        assert message in done.err


def test_a_compressed_teacher_is_refused(compressed: Path, cli: Call, untouched: Path) -> None:
    done: Any = cli("recover", compressed, "--teacher", compressed, "--out", untouched, "--device", "cpu")
    assert done.code == 2
    assert "already compressed" in done.err
