"""Outputs that may be replaced, and those that hold somebody else's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ffsplit.cli.ours import CHECKPOINT, DEMO, FRONT, MARK, check_ours
from ffsplit.errors import CheckpointError
from tests.unit.cli_fixtures import SMALL, Call
from tests.unit.test_bad_input import check_refused

PLAN = {MARK: '{"ffns": []}'}
POINTS = {FRONT: json.dumps({"points": [], "choices": [], "checkpoints": [{"directory": "keep-0.5"}]})}


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def test_what_commands_wrote_is_ours(compressed: Path, pruned: Path) -> None:
    for folder in (compressed, pruned):
        check_ours(folder, MARK)


def test_a_checkpoint_with_all_that_tokenizers_write_is_ours(tmp_path: Path) -> None:
    names = [name.replace("?????", "00001").replace("*", "x") for name in CHECKPOINT]
    check_ours(written(tmp_path, {**dict.fromkeys(names, ""), **PLAN, DEMO: "{}"}), DEMO)


def test_a_front_with_its_checkpoints_is_ours(tmp_path: Path) -> None:
    check_ours(written(tmp_path, {**POINTS, "pareto.svg": "", "keep-0.5/config.json": ""}), FRONT)


@pytest.mark.parametrize(
    ("mark", "files", "words"),
    [
        (MARK, {**PLAN, "my-notes.txt": ""}, "will not delete: my-notes.txt;"),
        (MARK, {**PLAN, **dict.fromkeys("abcde", "")}, "a, b, c and 2 more"),
        (MARK, {**PLAN, "my.safetensors": ""}, "my.safetensors"),
        (MARK, {**PLAN, "ffsplit_old/thesis.json": ""}, "ffsplit_old/thesis.json"),
        (MARK, {MARK: "{}"}, "not what ffsplit writes"),
        (MARK, {MARK: "my plan"}, "not what ffsplit writes"),
        (DEMO, {DEMO: "{}", "my-notes.txt": ""}, "my-notes.txt"),
        (FRONT, {FRONT: '{"points": [1]}'}, "not what ffsplit writes"),
        (FRONT, {**POINTS, "thesis.txt": ""}, "thesis.txt"),
        (FRONT, {**POINTS, "keep-0.5/thesis.txt": ""}, "keep-0.5/thesis.txt"),
        (FRONT, {**POINTS, "keep-0.9/config.json": ""}, "keep-0.9/config.json"),
    ],
)
def test_what_is_not_ours(tmp_path: Path, mark: str, files: dict[str, str], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        check_ours(written(tmp_path, files), mark)


def test_a_link_to_a_folder_is_not_ours(tmp_path: Path) -> None:
    written(tmp_path / "out", PLAN)
    (tmp_path / "out" / "data").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="data"):
        check_ours(tmp_path / "out", MARK)


@pytest.mark.parametrize("options", [(), ("--pareto",)])
def test_overwriting_keeps_what_others_put_there(
    cli: Call, llama: Path, compressed: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    out = written(Path(shutil.copytree(compressed, tmp_path / "out")), {**POINTS, "thesis.txt": "years of work"})
    refused = cli("compress", llama, "--out", out, "--overwrite", *options, *SMALL)
    check_refused(refused, "will not delete")
    assert (out / "thesis.txt").read_text() == "years of work"


def test_a_demo_keeps_what_others_put_there(cli: Call, llama: Path, compressed: Path, tmp_path: Path) -> None:
    out = written(Path(shutil.copytree(compressed, tmp_path / "out")), {DEMO: "{}", "thesis.txt": "years of work"})
    check_refused(cli("demo", "--model", llama, "--out", out), "thesis.txt")
    assert (out / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("options", "last"),
    [
        (("--pareto", "--methods", "prune", "--no-verify"), "ffsplit.report.plots.save_figure"),
        (("--recipe", "svd", "--keep", "0.5"), "ffsplit.pipeline.journal.Journal.store"),
    ],
)
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_what_came_there_during_the_work_stays(
    cli: Call, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], last: str,
    overwrite: tuple[str, ...],
) -> None:  # fmt: skip
    thesis = {**PLAN, **POINTS, "thesis.txt": "years of work"}
    monkeypatch.setattr(last, lambda *_: written(tmp_path / "out", thesis))
    refused = cli("compress", llama, "--out", tmp_path / "out", *options, *overwrite, "--device", "cpu", *SMALL)
    assert refused.code == 2, refused.err
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_what_came_there_during_a_demo_stays(
    cli: Call, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thesis = {DEMO: "{}", "thesis.txt": "years of work"}
    monkeypatch.setattr("ffsplit.pipeline.compress.compress", lambda *_, **__: written(tmp_path / "out", thesis))
    check_refused(cli("demo", "--model", llama, "--out", tmp_path / "out", "--device", "cpu", *SMALL), "thesis.txt")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
