from __future__ import annotations

import copy
import json
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
import torch
from torch import nn

from ffsplit import provenance as module
from ffsplit.errors import ModelError
from ffsplit.provenance import git_commit, hash_model, provenance


def two_layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def test_a_record_is_json_and_names_versions_hardware_and_seed() -> None:
    record = json.loads(json.dumps(provenance(two_layers(), seed=3, data={"source": "builtin"})))
    assert record["seed"] == 3
    assert record["data"] == {"source": "builtin"}
    assert record["versions"]["torch"] == torch.__version__
    assert record["hardware"]["cores"] >= 1
    assert record["hardware"]["cpu"]
    assert datetime.fromisoformat(record["date"]).utcoffset().total_seconds() == 0  # type: ignore[union-attr]
    assert record["model"]["class"] == "Sequential"
    assert record["model"]["hash"].startswith("sha256:")
    assert provenance()["model"] is None


def test_the_fingerprint_sees_every_value_type_and_name() -> None:
    reference = hash_model(two_layers())
    assert hash_model(two_layers()) == reference
    assert hash_model(two_layers(1)) != reference
    assert hash_model(two_layers().double()) != reference
    changed = two_layers()
    changed[1].running_mean[2] += 1e-6  # type: ignore[index, operator]
    assert hash_model(changed) != reference
    assert hash_model(nn.ModuleDict({"0": two_layers()[0], "one": two_layers()[1]})) != reference


def test_the_fingerprint_ignores_memory_layout_and_tying() -> None:
    plain, tied = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.ModuleList([nn.Linear(4, 4)] * 2)
    plain.load_state_dict(tied.state_dict())
    assert hash_model(plain) == hash_model(tied)
    strided = nn.Linear(4, 3)
    strided.weight.data = strided.weight.data.T.contiguous().T
    contiguous = nn.Linear(4, 3)
    contiguous.load_state_dict(strided.state_dict())
    assert not strided.weight.is_contiguous()
    assert hash_model(strided) == hash_model(contiguous)


def test_half_precision_has_a_fingerprint() -> None:
    assert hash_model(two_layers().to(torch.bfloat16)) != hash_model(two_layers())


def test_a_large_model_is_sampled_and_the_fingerprint_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FULL_HASH_BYTES", 0)
    monkeypatch.setattr(module, "_PIECE_BYTES", 16)
    model = nn.Linear(100, 3, bias=False)
    reference = hash_model(model)
    assert reference.startswith("sha256-sampled:")
    changed = {}
    for index in (0, 8, 150, 299):
        other = copy.deepcopy(model)
        other.weight.data.view(-1)[index] += 1
        changed[index] = hash_model(other) != reference
    assert changed == {0: True, 8: False, 150: False, 299: True}


def test_a_model_without_values_has_no_fingerprint() -> None:
    with pytest.raises(ModelError, match="weight: is on the meta device"):
        hash_model(nn.Linear(2, 2, bias=False, device="meta"))


def test_the_commit_is_that_of_a_checkout_of_ours_only(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    assert git_commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one", "--no-verify")
    assert git_commit(tmp_path) is None  # a repository, but not ours
    (tmp_path / "src" / "ffsplit").mkdir(parents=True)
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD") + "+changes"


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "src" / "ffsplit").mkdir(parents=True)
    monkeypatch.setenv("PATH", "")
    assert git_commit(tmp_path) is None
