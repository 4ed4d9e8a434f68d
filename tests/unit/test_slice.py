"""Sorted checkpoints and the narrower models that are sliced off them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ffsplit
from ffsplit.errors import CheckpointError, ModelError, RecipeError
from ffsplit.families import find_ffns, read
from ffsplit.methods.neurons import SCORES
from tests.tiny import tiny
from tests.unit.checkpoint_helpers import compressed, ids, outputs
from tests.unit.cli_fixtures import Call

SORT: dict[str, Any] = {"method": "sort"}
FAMILIES = ("llama", "llama-biased", "gpt2", "opt", "bert-mlm", "phi3", "t5-v1.1", "bart")


def stored(family: str, folder: Path, method: dict[str, Any] = SORT) -> Path:
    if family in ("t5-v1.1", "bart"):
        batches = [{"input_ids": ids(2, 8), "decoder_input_ids": ids(2, 8)} for _ in range(3)]
        result = ffsplit.compress(tiny(family), recipe={"method": method}, calibration=batches, device="cpu")
    else:
        result = compressed(family, method)
    saved = ffsplit.save(result, folder / "sorted")
    assert saved.kind == "stock"
    return saved.directory


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slice_is_an_ordinary_narrower_model(family: str, tmp_path: Path) -> None:
    directory = stored(family, tmp_path)
    full = ffsplit.load(directory)
    torch.testing.assert_close(outputs(full), outputs(tiny(family)), rtol=1e-4, atol=1e-5)
    half = ffsplit.load(directory, width=0.5)
    assert type(half) is type(full)
    for wide, narrow in zip(find_ffns(full).sites, find_ffns(half).sites, strict=True):
        assert narrow.d_ff == wide.d_ff // 2
        expected = read(full, wide).take(torch.arange(narrow.d_ff))
        assert all(torch.equal(t, expected.tensors()[name]) for name, t in read(half, narrow).tensors().items())
    half.save_pretrained(tmp_path / "half")
    assert "ffsplit" not in (tmp_path / "half" / "config.json").read_text()
    assert torch.equal(outputs(type(half).from_pretrained(tmp_path / "half")), outputs(half))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_slice_is_what_pruning_by_the_same_score_keeps(family: str, tmp_path: Path) -> None:
    prune = {"method": {"method": "prune", "score": "output_norm", "refit": False, "keep": 0.6}, "propagate": False}
    pruned = compressed(family, prune)
    width = pruned.plan.ffns[0].spec.neurons / 80
    torch.testing.assert_close(
        outputs(ffsplit.load(stored(family, tmp_path), width=width)), outputs(pruned.model), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("score", SCORES)
def test_every_score_gives_a_permutation(score: str) -> None:
    dense, result = tiny("llama"), compressed("llama", {**SORT, "score": score})
    for site, module in zip(find_ffns(dense).sites, result.sites, strict=True):
        before, after = read(dense, site), result.model.get_submodule(module.name).to_weights()
        order = (after.up[:, None] == before.up).all(-1).int().argmax(1)
        assert sorted(order.tolist()) == list(range(80))
        assert all(torch.equal(t, before.take(order).tensors()[name]) for name, t in after.tensors().items())
    torch.testing.assert_close(outputs(result.model), outputs(dense), rtol=1e-4, atol=1e-5)


def test_wider_slices_are_better(tmp_path: Path) -> None:
    directory, expected = stored("llama", tmp_path), outputs(tiny("llama"))
    errors = [float((outputs(ffsplit.load(directory, width=w)) - expected).norm()) for w in (0.1, 0.4, 0.7, 1.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 * errors[0]


def test_the_dtype_is_as_stored_or_as_asked_for(tmp_path: Path) -> None:
    directory = stored("llama", tmp_path)
    assert ffsplit.load(directory, width=0.5).dtype == torch.float32
    assert ffsplit.load(directory, width=0.5, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_load_without_a_width_takes_any_checkpoint(tmp_path: Path) -> None:
    result = compressed("llama")
    expected = outputs(result.model)
    ffsplit.save(result, tmp_path / "out")
    assert torch.equal(outputs(ffsplit.load(tmp_path / "out")), expected)
    with pytest.raises(ModelError, match="no model can be read"):
        ffsplit.load(tmp_path / "nothing")


@pytest.mark.parametrize("width", [0.0, -0.5, 1.1, float("nan")])
def test_a_width_is_a_share(width: float, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a share of the neurons is above 0 and at most 1"):
        ffsplit.load(tmp_path, width=width)


def test_an_unsorted_checkpoint_is_refused(tmp_path: Path) -> None:
    ffsplit.save(compressed("llama", {"method": "prune", "keep": 0.5}), tmp_path / "pruned")
    with pytest.raises(CheckpointError, match=r"2 of 2 FFNs are not sorted, first 'model.layers.0.mlp'; only what"):
        ffsplit.load(tmp_path / "pruned", width=0.5)
    tiny("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"holds no ffsplit_plan.json"):
        ffsplit.load(tmp_path / "dense", width=0.5)
    partly = compressed("llama", {"method": SORT, "overrides": [{"ffns": "1", "method": None}]})
    ffsplit.save(partly, tmp_path / "partly")
    with pytest.raises(CheckpointError, match=r"1 of 2 FFNs are not sorted, first 'model.layers.1.mlp'"):
        ffsplit.load(tmp_path / "partly", width=0.5)


@pytest.mark.parametrize("content", ["{", "[]", '{"ffns": [{}]}', '{"ffns": [{"site": {"name": 3}, "method": 1}]}'])
def test_a_damaged_plan_is_refused(content: str, tmp_path: Path) -> None:
    directory = stored("llama", tmp_path)
    (directory / "ffsplit_plan.json").write_text(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        ffsplit.load(directory, width=0.5)


def test_a_family_without_a_setting_for_the_width_is_refused(tmp_path: Path) -> None:
    directory = stored("bloom", tmp_path)
    with pytest.raises(ModelError, match="BloomForCausalLM has no setting for the width"):
        ffsplit.load(directory, width=0.5)


def test_the_command_writes_a_slice(cli: Call, tmp_path: Path) -> None:
    directory = stored("llama", tmp_path)
    outcome = cli("slice", directory, "--width", "0.5", "--out", tmp_path / "half", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.document["class"] == "LlamaForCausalLM"
    assert json.loads((tmp_path / "half" / "config.json").read_text())["intermediate_size"] == 40
    assert torch.equal(outputs(ffsplit.load(tmp_path / "half")), outputs(ffsplit.load(directory, width=0.5)))


def test_the_command_refuses_what_is_not_sorted(cli: Call, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "dense")
    outcome = cli("slice", tmp_path / "dense", "--width", "0.5", "--out", tmp_path / "half")
    assert outcome.code == 2
    assert "no known order" in outcome.err
    assert not (tmp_path / "half").exists()
