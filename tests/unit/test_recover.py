"""Whole-model distillation of compressed models, and what must stay as it is."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import ffsplit
from ffsplit.calibrate.tokens import TokenWindows
from ffsplit.errors import DataError, RecipeError, ResumeError
from ffsplit.families import find_ffns, read
from ffsplit.ffn.projections import NM, Masked, Packed, Tied
from ffsplit.ffn.sum import SumFFN
from ffsplit.pipeline.recover import recovery_of
from ffsplit.recover.codes import TrainedCodes
from ffsplit.recover.config import Recovery
from ffsplit.recover.distillation import Distillation
from ffsplit.recover.guide import guided
from ffsplit.recover.head_loss import through_head
from ffsplit.recover.layers import Layer
from ffsplit.recover.refit import refit_layer
from ffsplit.recover.run import recover_model
from ffsplit.recover.text import Text, recovery_text
from ffsplit.recover.weights import as_sums
from ffsplit.recover.whole import prepared
from ffsplit.recover.workers import Workers
from ffsplit.train import loop
from tests.tiny import strong, tiny
from tests.unit.fitted import fitted

CPU = torch.device("cpu")
IDS = torch.randint(5, 100, (24, 16), generator=torch.Generator().manual_seed(0))
WINDOWS = TokenWindows.from_ids(IDS)


def compressed(dense: PreTrainedModel, recipe: dict[str, Any]) -> PreTrainedModel:
    return fitted(dense, recipe, IDS).model


def pruned(dense: PreTrainedModel) -> PreTrainedModel:
    return compressed(dense, {"method": {"method": "prune", "keep": 0.5, "score": "magnitude", "refit": False}})


def settings(**fields: Any) -> Recovery:
    return Recovery(**{"steps": 30, "batch_size": 4, "lr": 3e-3, "seq_len": 16, **fields})


def recovered(student: PreTrainedModel, dense: PreTrainedModel | None, **fields: Any) -> dict[str, Any]:
    return recover_model(student, dense, WINDOWS, settings(**fields), device=CPU)["stages"][0]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "fields", [{}, {"train": "all", "lr": 3e-4}, {"lora": 4, "lr": 1e-2}, {"hidden": 0.5}, {"temperature": 2}]
)
def test_the_held_out_loss_falls(fields: dict[str, Any]) -> None:
    dense = strong("llama")
    student = pruned(dense)
    before = state(dense)
    notes = recovered(student, dense, **fields)
    assert notes["held_out_loss"] < 0.95 * notes["held_out_loss_before"]
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    assert not any(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("family", ["bert-mlm", "bert", "mpnet", "bert-classifier", "t5", "gemma2"])
def test_models_of_other_kinds(family: str) -> None:
    dense = strong(family)
    student = pruned(dense)
    notes = recovered(student, dense, steps=12)
    assert notes["held_out_loss"] < notes["held_out_loss_before"]


def test_only_the_branches_are_trained() -> None:
    dense = strong("llama")
    student = pruned(dense)
    before = state(student)
    recovered(student, dense, steps=3)
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed
    assert all(".mlp.branches." in name for name in changed)


def test_a_model_that_is_its_teacher_has_no_loss_and_stays() -> None:
    dense = strong("llama")
    student = copy.deepcopy(dense)
    as_sums(student)
    loss = Distillation(student, dense, settings(), recovery_text(student, WINDOWS, settings(), None).batch(0))
    text = recovery_text(student, WINDOWS, settings(), None)
    with torch.no_grad():
        assert float(loss(text.batch(0))) == pytest.approx(0, abs=1e-6)


def test_text_alone_trains_a_language_model_and_nothing_else() -> None:
    dense = strong("llama")
    notes = recovered(pruned(dense), None, train="all", lr=1e-2)
    assert notes["held_out_loss"] < notes["held_out_loss_before"]
    with pytest.raises(ffsplit.ModelError, match="give a teacher"):
        recovered(pruned(strong("bert")), None)


@pytest.mark.parametrize("kept", [0, 1])
def test_the_chunked_head_gives_the_loss_and_gradients_of_the_whole(kept: int) -> None:
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 6, generator=generator, requires_grad=True) for n in (11, 9))
    bias = torch.randn(9, generator=generator, requires_grad=bool(kept))
    targets = torch.randint(0, 9, (11,), generator=generator)

    def loss(logits: Tensor, rows: slice) -> Tensor:
        return nn.functional.cross_entropy(logits, targets[rows], reduction="sum")

    leaves = [states, weight] + [bias] * kept
    whole = loss(states @ weight.T + bias, slice(None))
    wanted = torch.autograd.grad(whole, leaves)
    pieces = 2.0 * through_head(states, weight, bias, loss, 4)
    found = torch.autograd.grad(pieces, leaves)
    torch.testing.assert_close(pieces, 2 * whole)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, 2 * other)


def test_one_seed_gives_one_result_and_another_another() -> None:
    dense = strong("llama")
    runs = []
    for seed in (0, 0, 1):
        student = pruned(dense)
        recovered(student, dense, steps=4, seed=seed)
        runs.append(state(student))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("fields", [{"accumulate": 2}, {"lora": 2}])
def test_a_killed_run_ends_at_the_very_weights(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = strong("llama")
    start, config = pruned(dense), settings(steps=10, evaluations=3, **fields)
    whole, part = copy.deepcopy(start), copy.deepcopy(start)
    notes = recover_model(whole, dense, WINDOWS, config, device=CPU)

    def die(_label: str, done: int, _total: int) -> None:
        if done == 6:
            raise _KilledError

    monkeypatch.setattr("ffsplit.recover.whole.SAVE_SECONDS", 0.0)
    with pytest.raises(_KilledError):
        recover_model(part, dense, WINDOWS, config, device=CPU, folder=tmp_path, progress=die)
    resumed = copy.deepcopy(start)
    steps: list[int] = []
    again = recover_model(
        resumed, dense, WINDOWS, config, device=CPU, folder=tmp_path, progress=lambda _l, done, _t: steps.append(done)
    )
    assert steps[0] > 3
    assert all(torch.equal(resumed.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())
    assert again["stages"][0]["held_out_loss"] == notes["stages"][0]["held_out_loss"]
    finished = copy.deepcopy(start)
    recover_model(finished, dense, WINDOWS, config, device=CPU, folder=tmp_path, progress=die)
    assert all(torch.equal(finished.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())
    with pytest.raises(ResumeError, match="other recovery"):
        recover_model(copy.deepcopy(start), dense, WINDOWS, settings(seed=3), device=CPU, folder=tmp_path)


@pytest.mark.parametrize("stage", ["blocks", "model"])
def test_a_kill_before_the_result_is_kept_loses_no_training(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of a training stays until what it led to is on disk."""
    dense = strong("llama")
    start, config = pruned(dense), settings(steps=10, stages=stage)
    monkeypatch.setattr("ffsplit.recover.whole.SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr("ffsplit.recover.store.save_file", _killed)
        with pytest.raises(_KilledError):
            recover_model(copy.deepcopy(start), dense, WINDOWS, config, device=CPU, folder=tmp_path)
    assert len(list(tmp_path.glob("*-state.safetensors"))) == 1
    steps: list[int] = []
    step = loop._Run.step

    def counted(run: Any, *arguments: Any) -> None:
        steps.append(run.standing.step)
        step(run, *arguments)

    monkeypatch.setattr(loop._Run, "step", counted)
    recover_model(copy.deepcopy(start), dense, WINDOWS, config, device=CPU, folder=tmp_path)
    assert steps[0] == 9
    assert not list(tmp_path.glob("*-state.safetensors"))


def _killed(*_arguments: Any, **_options: Any) -> None:
    raise _KilledError


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [("workers", lambda _device: Workers(count=2), "processes"), ("precision_of", lambda *_: "bfloat16", "precision")],
)
def test_another_number_of_processes_or_precision_is_another_run(
    place: str, value: Any, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = strong("llama")
    start, config = pruned(dense), settings(steps=1)
    recover_model(copy.deepcopy(start), dense, WINDOWS, config, device=CPU, folder=tmp_path)
    monkeypatch.setattr(f"ffsplit.recover.run.{place}", value)
    with pytest.raises(ResumeError, match=f"other {what}"):
        recover_model(copy.deepcopy(start), dense, WINDOWS, config, device=CPU, folder=tmp_path)


def test_merged_adapters_give_what_the_adapted_model_gave() -> None:
    dense = strong("llama")
    student = pruned(dense)
    before = student(input_ids=IDS[:2]).logits
    with prepared(student, settings(lora=3)) as adapters:
        assert adapters
        with torch.no_grad():
            for parameter in adapters.values():
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        wanted = student(input_ids=IDS[:2]).logits
    torch.testing.assert_close(student(input_ids=IDS[:2]).logits, wanted)
    assert not torch.allclose(before, wanted)
    assert not any("lora" in name for name in student.state_dict())


def _modules(model: nn.Module, kind: type[nn.Module]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def test_zeros_stay_where_they_are() -> None:
    dense = strong("llama")
    for kind, pattern in ((NM, {"pattern": "2:4"}), (Masked, {"keep": 0.5})):
        student = compressed(dense, {"method": {"method": "sparsify", "score": "wanda", "refit": False, **pattern}})
        zeros = [module.dense() == 0 for module in _modules(student, kind)]
        assert zeros
        specs = [module.spec for module in _modules(student, SumFFN)]
        notes = recovered(student, dense, steps=8)
        assert notes["held_out_loss"] < notes["held_out_loss_before"]
        assert all(
            torch.equal(was, module.dense() == 0) for was, module in zip(zeros, _modules(student, kind), strict=True)
        )
        assert [module.spec for module in _modules(student, SumFFN)] == specs


@pytest.mark.parametrize("scale_bits", [8, 16])
def test_scales_of_packed_matrices_are_trained_and_codes_are_not(scale_bits: int) -> None:
    dense = strong("llama")
    method = {"method": "quantize", "code_bits": 2, "rounding": "rtn", "refit": False, "group": 16}
    student = compressed(dense, {"method": {**method, "scale_bits": scale_bits}})
    codes = [module.codes.clone() for module in _modules(student, Packed)]
    frozen = copy.deepcopy(student)
    notes = recovered(student, dense, steps=20)
    assert notes["held_out_loss"] < 0.97 * notes["held_out_loss_before"]
    assert all(torch.equal(was, module.codes) for was, module in zip(codes, _modules(student, Packed), strict=True))
    text = recovery_text(student, WINDOWS, settings(), None)
    loss = Distillation(student, dense, settings(), text.batch(0))
    with torch.no_grad():
        stored = float(torch.stack([loss(sample) for sample in text.held_out_batches()]).mean())
    assert stored == pytest.approx(notes["held_out_loss"], rel=0.02)
    with pytest.raises(RecipeError, match="nothing can be trained"):
        recovered(frozen, dense, low_bit="frozen")


CODED = {
    "2-bit": {"code_bits": 2, "group": 16},
    "3-bit, a short last group, 8-bit scales": {"code_bits": 3, "group": 24, "scale_bits": 8},
    "symmetric": {"code_bits": 4, "group": 32, "symmetric": True},
    "input scales": {"code_bits": 3, "group": 16, "rounding": "awq"},
    "outlier columns": {"code_bits": 2, "group": 16, "outliers": 0.1},
    "outlier weights": {"code_bits": 2, "group": 16, "outlier_weights": 0.02},
}


@pytest.mark.parametrize("fields", CODED.values(), ids=CODED)
def test_codes_are_trained_and_stored_as_the_training_saw_them(fields: dict[str, Any]) -> None:
    dense = strong("llama")
    method = {"method": "quantize", "rounding": "rtn", "refit": False, **fields}
    student = compressed(dense, {"method": method})
    codes = [module.codes.clone() for module in _modules(student, Packed)]
    specs = [module.spec for module in _modules(student, SumFFN)]
    text = recovery_text(student, WINDOWS, settings(), None)
    sample = text.batch(0).inputs
    before = student(**sample).logits
    with prepared(student, settings(low_bit="codes")) as chosen:
        assert torch.equal(student(**sample).logits, before)  # nothing was rounded anew
        assert any(name.endswith(".weight") for name in chosen)
        loss = Distillation(student, dense, settings(), text.batch(0))
        optimizer = torch.optim.AdamW(chosen.values(), lr=1e-2)
        for step in range(6):
            optimizer.zero_grad()
            loss(text.batch(step)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        matrices = [module.dense().detach() for module in _modules(student, TrainedCodes)]
        wanted = student(**sample).logits
    packed = _modules(student, Packed)
    assert len(matrices) == len(packed) == len(codes)
    for matrix, module in zip(matrices, packed, strict=True):
        assert torch.equal(module.dense(), matrix)
    assert torch.equal(student(**sample).logits, wanted)
    assert any(not torch.equal(was, module.codes) for was, module in zip(codes, packed, strict=True))
    assert [module.spec for module in _modules(student, SumFFN)] == specs


def test_trained_codes_beat_trained_scales_and_are_stored_exactly() -> None:
    dense = strong("llama")
    method = {"method": "quantize", "code_bits": 2, "rounding": "rtn", "refit": False, "group": 16}
    start = compressed(dense, {"method": method})
    windows = TokenWindows.from_ids(torch.randint(5, 100, (160, 16), generator=torch.Generator().manual_seed(0)))
    losses = {}
    for low_bit in ("scales", "codes"):
        student, config = copy.deepcopy(start), settings(low_bit=low_bit, batch_size=8, steps=40, evaluations=4)
        losses[low_bit] = recover_model(student, dense, windows, config, device=CPU)["stages"][0]["held_out_loss"]
    text = recovery_text(student, windows, config, None)
    loss = Distillation(student, dense, config, text.batch(0))
    with torch.no_grad():
        stored = float(torch.stack([loss(sample) for sample in text.held_out_batches()]).mean())
    assert stored == pytest.approx(losses["codes"], rel=1e-5)
    assert losses["codes"] < 0.95 * losses["scales"]


@pytest.mark.parametrize("low_bit", ["scales", "codes"])
def test_every_packed_ffn_learns_from_its_original(low_bit: str) -> None:
    dense = strong("llama")
    student = compressed(dense, PACKED)
    notes = recovered(student, dense, stages="blocks", low_bit=low_bit, steps=20, lr=2e-3)
    assert all(layer["held_out_loss"] < layer["held_out_loss_before"] for layer in notes["layers"])


def test_tied_projections_stay_tied() -> None:
    dense = strong("llama")
    student = compressed(dense, {"method": {"method": "share", "keep": 0.8, "protect_first": 0, "protect_last": 0}})
    tied = _modules(student, Tied)
    assert tied
    with torch.no_grad():  # as it came, it is as good as this text can make it
        for module in tied:
            next(module.owner.parameters()).mul_(0.7)
    notes = recovered(student, dense, steps=8)
    assert notes["held_out_loss"] < notes["held_out_loss_before"]
    owners = [id(module.owner) for module in tied]
    assert all(owner in set(map(id, student.modules())) for owner in owners)


SVD = {"method": {"method": "svd", "keep": 0.5}}
PRUNED = {"method": {"method": "prune", "keep": 0.5, "score": "magnitude", "refit": False}}
LINEAR = {"method": {"method": "ffsplit", "keep": 0.5, "rest": "linear"}}
PACKED = {"method": {"method": "quantize", "code_bits": 2, "rounding": "rtn", "refit": False, "group": 16}}


@pytest.mark.parametrize("prefix", ["compressed", "dense"])
@pytest.mark.parametrize("recipe", [SVD, PRUNED, PACKED], ids=["svd", "prune", "quantize"])
def test_every_ffn_learns_from_its_original(recipe: dict[str, Any], prefix: str) -> None:
    dense = strong("llama")
    student = compressed(dense, recipe)
    specs = [module.spec for module in _modules(student, SumFFN)]
    notes = recovered(student, dense, stages="blocks", prefix=prefix, steps=20, lr=2e-3)
    assert len(notes["layers"]) == 2
    assert all(layer["held_out_loss"] < layer["held_out_loss_before"] for layer in notes["layers"])
    assert [module.spec for module in _modules(student, SumFFN)] == specs


@pytest.mark.parametrize("name", ["llama", "llama-biased", "gpt2", "bert-mlm"])
@pytest.mark.parametrize("recipe", [SVD, PRUNED], ids=["svd", "prune"])
def test_output_maps_are_solved_for(recipe: dict[str, Any], name: str) -> None:
    dense = strong(name)
    student = compressed(dense, recipe)
    windows = TokenWindows.from_ids(torch.randint(5, 100, (160, 16), generator=torch.Generator().manual_seed(0)))
    done = recover_model(student, dense, windows, settings(stages="refit"), device=CPU)["stages"][0]
    assert all(layer["held_out_loss"] < 0.98 * layer["held_out_loss_before"] for layer in done["layers"])


def test_the_refit_of_dense_maps_is_least_squares() -> None:
    """Against torch's own solver, on the very rows."""
    dense = strong("llama-biased")
    student = pruned(dense)
    module = _modules(student, SumFFN)[0]
    ffn = find_ffns(dense).sites[0]
    rows = torch.randn(600, 32, generator=torch.Generator().manual_seed(0))
    layer = Layer(0, "ffn", module, read(dense, ffn), rows[:500], rows[500:])
    with torch.no_grad():
        wanted = layer.wanted(layer.inputs)
        hidden = torch.cat([module.branches[0].hidden(layer.inputs), torch.ones(500, 1)], dim=1)
        solution = torch.linalg.lstsq(hidden.double(), wanted.double()).solution
        module.branches[0].down.weight.mul_(0.5)  # so that there is something to gain on other rows too
        refit_layer(layer)
    torch.testing.assert_close(module.branches[0].down.weight.double(), solution[:-1].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.bias.double(), solution[-1], rtol=1e-4, atol=1e-5)


def test_stages_follow_each_other_and_a_killed_one_goes_on(tmp_path: Path) -> None:
    dense = strong("llama")
    start = compressed(dense, SVD)
    config = settings(stages="refit,blocks,model", steps=5, lr=1e-3)
    whole, part = copy.deepcopy(start), copy.deepcopy(start)
    notes = recover_model(whole, dense, WINDOWS, config, device=CPU)
    assert [stage["stage"] for stage in notes["stages"]] == ["refit", "blocks", "model"]

    def die(label: str, done: int, _total: int) -> None:
        if label == "blocks" and done == 1:
            raise _KilledError

    with pytest.raises(_KilledError):
        recover_model(part, dense, WINDOWS, config, device=CPU, folder=tmp_path, progress=die)
    assert (tmp_path / "blocks-0000-done.safetensors").is_file()
    resumed = copy.deepcopy(start)
    recover_model(resumed, dense, WINDOWS, config, device=CPU, folder=tmp_path)
    assert all(torch.equal(resumed.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())


def test_a_guide_starts_as_the_dense_model_and_is_gone_at_the_end() -> None:
    dense = strong("llama")
    student = pruned(dense)
    alone = student(input_ids=IDS[:2]).logits.detach()
    with guided(student, dense, 4) as guide:
        wanted = dense(input_ids=IDS[:2]).logits
        torch.testing.assert_close(student(input_ids=IDS[:2]).logits, wanted)
        guide.at(4)
        torch.testing.assert_close(student(input_ids=IDS[:2]).logits, alone)
        guide.at(2)
        assert guide.share == pytest.approx(0.5)
        with torch.no_grad():  # what is measured is the compressed model
            torch.testing.assert_close(student(input_ids=IDS[:2]).logits, alone)
    torch.testing.assert_close(student(input_ids=IDS[:2]).logits, alone)
    notes = recovered(student, dense, guide=0.5)
    assert notes["held_out_loss"] < notes["held_out_loss_before"]


def test_half_precision_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = strong("llama")
    student = pruned(dense).to(torch.bfloat16)
    recovered(student, dense.to(torch.bfloat16), steps=3, precision="bfloat16")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"stages": "blocks,wibble"}, "wibble"),
        ({"stages": "model,model"}, "at most once"),
        ({"lora": 4, "train": "all"}, "choose one"),
        ({"lr": -1}, "lr"),
        ({"stpes": 4}, "stpes"),
        ({"labels": 2}, "labels"),
        ({"guide": 0.5, "minutes": 1}, "give steps alone"),
        *(({name: float("inf")}, name) for name in ("hidden", "temperature", "minutes", "clip", "weight_decay", "lr")),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recovery_of(values)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": 4}, "no dense matrices"),
        ({"low_bit": "frozen"}, "nothing can be trained"),
        ({"stages": "blocks,model", "low_bit": "frozen"}, "nothing can be trained"),
    ],
)
def test_a_model_with_nothing_to_train_takes_no_folder(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    dense = strong("llama")
    student = compressed(dense, {"method": {"method": "quantize", "bits": 5, "rounding": "rtn", "group": 8}})
    with pytest.raises(RecipeError, match=message):
        recover_model(student, dense, WINDOWS, settings(**fields), device=CPU, folder=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_rank_above_that_of_every_matrix_is_refused() -> None:
    dense = strong("llama")
    student = pruned(dense)  # matrices of 40 and 32
    with pytest.raises(RecipeError, match=r"lora=33: .* above 32"):
        recovered(student, dense, lora=33)
    assert recovered(student, dense, lora=32, steps=1)["steps"] == 1


def test_too_little_text_is_refused() -> None:
    dense = strong("llama")
    with pytest.raises(DataError, match="at least 2 windows"):
        recover_model(pruned(dense), dense, TokenWindows.from_ids(IDS[:1]), settings(), device=CPU)


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    dense = strong("llama")
    other = tiny("llama")
    other.resize_token_embeddings(111)
    with pytest.raises(DataError, match="cannot distil"):
        recover_model(pruned(dense), other, WINDOWS, settings(), device=CPU, folder=tmp_path / "work")
    assert not (tmp_path / "work").exists()
    with pytest.raises(RecipeError, match="give the teacher"):
        recovered(pruned(dense), None, stages=("blocks",))


def test_a_recipe_recovers_what_it_fitted(tmp_path: Path) -> None:
    dense = strong("llama")
    recipe = {
        "method": {"method": "prune", "keep": 0.5},
        "recovery": {"steps": 6, "batch_size": 4, "seq_len": 16, "lr": 1e-3},
    }
    result = ffsplit.compress(copy.deepcopy(dense), recipe=recipe, calibration=IDS, device="cpu")
    assert result.report["recovery"]["stages"][0]["steps"] == 6
    saved = ffsplit.save(result, tmp_path / "out")
    assert saved.kind == "stock"
    assert "Then recovered" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("fields", [{"stages": "refit"}, {"stages": "blocks"}, {"guide": 0.5}])
def test_ffns_that_do_not_stand_for_the_dense_ones_are_not_compared_with_them(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    dense = strong("llama")
    recipe = {"method": {"method": "prune", "keep": 0.5}, "fold_norms": True}
    result = ffsplit.compress(copy.deepcopy(dense), recipe=recipe, calibration=IDS, device="cpu")
    ffsplit.save(result, tmp_path / "folded")
    with pytest.raises(RecipeError, match="fold_norms"):
        ffsplit.recover_checkpoint(tmp_path / "folded", dense, data=IDS, recovery=fields)
    for whole in (recipe, {"method": {"method": "ffn-fusion", "count": 1}}):
        with pytest.raises(RecipeError, match="at its place in the dense model"):
            ffsplit.compress(copy.deepcopy(dense), recipe={**whole, "recovery": fields}, calibration=IDS, device="cpu")


def test_adapters_beside_shared_matrices_are_refused() -> None:
    dense = strong("llama")
    student = compressed(dense, {"method": {"method": "share", "keep": 0.8, "protect_first": 0, "protect_last": 0}})
    before = state(student)
    with pytest.raises(RecipeError, match="share their matrices"):
        recovered(student, dense, lora=2)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


def test_ffns_of_one_block_go_on_from_the_inputs_that_they_had(tmp_path: Path) -> None:
    dense = strong("xlm")
    start = compressed(dense, SVD)
    config = settings(stages="refit", steps=5)
    first, again = copy.deepcopy(start), copy.deepcopy(start)
    recover_model(first, dense, WINDOWS, config, device=CPU, folder=tmp_path)
    for file in tmp_path.glob("*-done.safetensors"):  # as if it was killed after the first FFN
        if file.name != "refit-0000-done.safetensors":
            file.unlink()
    recover_model(again, dense, WINDOWS, config, device=CPU, folder=tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize(
    "method",
    [
        {"method": "share", "keep": 0.8, "protect_first": 0, "protect_last": 0},
        {"method": "ffn-fusion", "count": 1, "tol": None},
        {"method": "finercut", "count": 1, "target": "attention"},
        {"method": "bias-prune", "tolerance": 0.5},
    ],
    ids=lambda method: str(method["method"]),
)
def test_what_a_planner_decided_is_recovered_and_saved_again(method: dict[str, Any], tmp_path: Path) -> None:
    dense = strong("llama-biased" if method["method"] == "bias-prune" else "llama")
    result = ffsplit.compress(copy.deepcopy(dense), recipe={"method": method}, calibration=IDS, device="cpu")
    ffsplit.save(result, tmp_path / "small")
    config = {"steps": 3, "batch_size": 4, "seq_len": 16}
    better = ffsplit.recover_checkpoint(tmp_path / "small", dense, data=IDS, recovery=config, device="cpu")
    assert [ffn.method for ffn in better.plan.ffns] == [ffn.method for ffn in result.plan.ffns]
    assert better.plan.attention == result.plan.attention
    ffsplit.save(better, tmp_path / "better")
    config_of = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("small", "better")]
    stored = [one.get("quantization_config") for one in config_of]
    assert (stored[0] or {}).get("attention") == (stored[1] or {}).get("attention")
    again = ffsplit.load(tmp_path / "better")
    assert torch.isfinite(again(input_ids=IDS[:2]).logits).all()


def test_padded_windows_of_similar_length_share_a_batch() -> None:
    lengths = 2 + torch.randperm(60, generator=torch.Generator().manual_seed(0)) % 14
    mask = (torch.arange(16) < lengths[:, None]).long()
    ids = torch.arange(60)[:, None].expand(60, 16) + 5  # every window is told by its id
    text = Text(TokenWindows.from_ids(ids, mask), held_out=4, batch_size=8, seed=0, causal=False)
    batches = [text.batch(number) for number in range(7)]
    seen = torch.cat([batch.inputs["input_ids"][:, 0] for batch in batches]) - 5
    assert sorted(seen.tolist()) == list(range(56))
    assert (
        seen.tolist() != torch.cat([text.batch(number).inputs["input_ids"][:, 0] for number in range(7, 14)]).tolist()
    )
    for number, batch in enumerate(batches):
        assert torch.equal(text.batch(number).inputs["input_ids"], batch.inputs["input_ids"])
    padded = sum(int((batch.inputs["attention_mask"] == 0).sum()) for batch in batches)
    assert padded < 0.1 * int(lengths[:56].sum())
