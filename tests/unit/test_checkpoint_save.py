"""Saving: whole or not at all, and everything that belongs to a checkpoint is in it."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

import ffsplit
from ffsplit.checkpoint import reload, save
from ffsplit.errors import CheckpointError
from tests.unit.checkpoint_helpers import PARTLY, PRUNE, SPLIT, compressed, contents, outputs
from tests.unit.evaluate_helpers import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def result() -> ffsplit.CompressionResult:
    """One that tests save and do not change."""
    return compressed("llama")


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is no JSON")


def test_an_existing_target_is_refused_and_untouched(result: ffsplit.CompressionResult, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="not empty"):
        ffsplit.save(result, target)
    assert contents(tmp_path) == {"out/mine.txt": b"keep"}
    with pytest.raises(CheckpointError, match="not a directory"):
        ffsplit.save(result, target / "mine.txt")
    with pytest.raises(CheckpointError):
        ffsplit.save(result, target / "mine.txt" / "below")
    assert contents(tmp_path) == {"out/mine.txt": b"keep"}


def test_an_empty_target_is_filled(result: ffsplit.CompressionResult, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    ffsplit.save(result, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").is_file()


def test_overwriting_replaces_everything(result: ffsplit.CompressionResult, tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "deep").mkdir(parents=True)
    (target / "deep" / "old.txt").write_text("old")
    saved = ffsplit.save(result, target, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "deep/old.txt" not in contents(target)
    assert saved.bytes == sum(map(len, contents(target).values()))


def fail_with_full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def other_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "_difference", lambda *_: 0.5)


def not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "_difference", lambda *_: float("nan"))


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail_with_full_disk)


def full_disk_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "model_card", fail_with_full_disk)


def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))


def damaged_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the disk is cut off."""
    write = PreTrainedModel.save_pretrained

    def cut(self: PreTrainedModel, folder: Path, **options: Any) -> None:
        write(self, folder, **options)
        for file in Path(folder).glob("*.safetensors"):
            os.truncate(file, file.stat().st_size // 2)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", cut)


def lost_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    write = PreTrainedModel.save_pretrained

    def drop(self: PreTrainedModel, folder: Path, **options: Any) -> None:
        write(self, folder, **options)
        file = Path(folder) / "model.safetensors"
        tensors = load_file(file)
        del tensors["model.norm.weight"]
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", drop)


FAILURES = [other_outputs, not_a_number, full_disk, full_disk_at_the_end, small_disk, damaged_files, lost_tensor]


@pytest.mark.parametrize("method", [SPLIT, PRUNE], ids=["ffsplit", "stock"])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_in_the_middle_leaves_nothing(
    method: dict[str, Any], failure: Any, exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    if exists:
        target.mkdir()
        (target / "old.txt").write_text("old")
    result = compressed("llama", method)
    with monkeypatch.context() as patch:
        failure(patch)
        with pytest.raises(CheckpointError):
            ffsplit.save(result, target, overwrite=exists)
    assert contents(tmp_path) == ({"out/old.txt": b"old"} if exists else {})
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out"] if exists else [])
    assert ffsplit.save(result, target, overwrite=exists).directory == target


def test_a_file_that_cannot_grow_is_a_checkpoint_error(result: ffsplit.CompressionResult, tmp_path: Path) -> None:
    """The real thing, whatever error the library that writes the tensors makes of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            ffsplit.save(result, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_move_that_fails_puts_the_old_directory_back(
    result: ffsplit.CompressionResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")
    move = os.replace

    def fail(source: Path, destination: Path) -> None:
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        move(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(save.os, "replace", fail)
        with pytest.raises(CheckpointError, match="moved into place"):
            ffsplit.save(result, target, overwrite=True)
    assert contents(tmp_path) == {"out/old.txt": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_follow_the_umask(result: ffsplit.CompressionResult, mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        ffsplit.save(result, tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    for file in (tmp_path / "out").iterdir():
        assert file.stat().st_mode & 0o444 & ~mask == 0o444 & ~mask, file.name


@pytest.mark.parametrize("name", ["out", "a/b/out", "./out", "out/", "a/../out"])
def test_relative_paths(
    result: ffsplit.CompressionResult, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = ffsplit.save(result, name)
    assert saved.directory == Path(name)
    assert LlamaForCausalLM.from_pretrained(os.path.normpath(name)) is not None
    assert not list(tmp_path.rglob(".*"))


def test_the_current_directory(
    result: ffsplit.CompressionResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    ffsplit.save(result, ".")
    assert (here / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_link_to_a_directory_stays_a_link(result: ffsplit.CompressionResult, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old.txt").write_text("old")
    (tmp_path / "link").symlink_to("real")
    ffsplit.save(result, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("method", [SPLIT, PRUNE, PARTLY], ids=["ffsplit", "stock", "partly"])
def test_saving_twice_gives_the_same_files(method: dict[str, Any], tmp_path: Path) -> None:
    result = compressed("llama", method)
    ffsplit.save(result, tmp_path / "one")
    ffsplit.save(result, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_shards(result: ffsplit.CompressionResult, tmp_path: Path) -> None:
    ffsplit.save(result, tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert torch.equal(outputs(LlamaForCausalLM.from_pretrained(tmp_path / "out")), outputs(result.model))


@pytest.mark.parametrize("method", [SPLIT, PRUNE], ids=["ffsplit", "stock"])
def test_what_a_checkpoint_holds(method: dict[str, Any], tmp_path: Path) -> None:
    result = compressed(tiny_llama(hidden_size=32, intermediate_size=64), method, byte_tokenizer())
    result.report["layers"][0]["output_error"] = float("nan")
    result.report["odd"] = (float("inf"), torch.float32, Path("a"))
    out = ffsplit.save(result, tmp_path / "out").directory
    for file in out.glob("*.json"):
        json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
    report = json.loads((out / "ffsplit_report.json").read_text())
    assert report["layers"][0]["output_error"] is None
    assert report["odd"] == [None, "torch.float32", "a"]
    assert ffsplit.load_recipe(out / "ffsplit_recipe.yaml") == result.recipe
    plan = json.loads((out / "ffsplit_plan.json").read_text())
    assert [ffn["site"]["name"] for ffn in plan["ffns"]] == [site.name for site in result.sites]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("Hello.", add_special_tokens=False)["input_ids"]) == "Hello."
    card = (out / "README.md").read_text(encoding="utf-8")
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header)["tags"] == ["ffsplit"]
    assert ("import ffsplit" in text) == (method is SPLIT)
    assert not [file.name for file in out.iterdir() if file.suffix in {".bin", ".pt", ".pkl"}]


def test_without_verification_nothing_is_loaded(
    result: ffsplit.CompressionResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "reload_and_compare", fail_with_full_disk)
    assert ffsplit.save(result, tmp_path / "out", verify=False).kind == "ffsplit"
