"""``ffsplit recover``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

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
        (("--lora", "4", "--train", "all"), "choose one"),
        (("--seq-len", "100000"), "seq_len"),
    ],
)
def test_bad_input_is_refused(options: tuple[str, ...], message: str, pruned: Path, cli: Call, untouched: Path) -> None:
    done = cli("recover", pruned, "--out", untouched, "--device", "cpu", *options)
    assert done.code == 2
    assert message in done.err


def test_a_plain_model_is_refused(llama: Path, cli: Call, untouched: Path) -> None:
    done = cli("recover", llama, "--teacher", llama, "--out", untouched, "--device", "cpu")
    assert done.code == 2
    assert "ffsplit_plan.json" in done.err


def test_a_compressed_teacher_is_refused(compressed: Path, cli: Call, untouched: Path) -> None:
    done: Any = cli("recover", compressed, "--teacher", compressed, "--out", untouched, "--device", "cpu")
    assert done.code == 2
    assert "already compressed" in done.err
