"""``ffsplit glue`` from data to report, and again after it was killed."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import ffsplit
from ffsplit.errors import FFSplitError, ModelError, ResumeError
from ffsplit.pipeline.load import open_source
from ffsplit.pipeline.recipe import load_recipe
from ffsplit.recover.weights import as_sums, sums_of
from ffsplit.tasks.classifier import load_classifier
from ffsplit.tasks.encode import encode
from ffsplit.tasks.examples import TaskData, read_task
from ffsplit.tasks.finetune import TuneSettings, fine_tune, predict, scores
from ffsplit.tasks.parts import find_parts
from ffsplit.tasks.run import GlueJob, claim, claimed, run_glue
from ffsplit.tasks.task import task_of
from ffsplit.train.loop import Hooks
from ffsplit.train.movement import Movement
from ffsplit.train.state import Standing
from tests.unit.cli_fixtures import Call, cli, saved  # noqa: F401 - a fixture
from tests.unit.evaluate_helpers import build, byte_tokenizer, tiny_bert

TUNE = TuneSettings(epochs=3, lr=3e-3, batch_size=16, hidden=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of As and Bs, whose label is which of the two there is more of."""
    folder = tmp_path_factory.mktemp("task")
    generator = np.random.default_rng(0)
    for part, count in (("train", 160), ("dev", 32), ("test", 32)):
        lines = ["sentence\tlabel"]
        for _ in range(count):
            label = int(generator.integers(2))
            lines.append("".join(generator.permutation(list("ba"[label] * 6 + "ab"[label] * 1))) + f"\t{label}")
        (folder / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_bert("AutoModel"), tmp_path_factory.mktemp("encoder") / "bert")


def data_of(folder: Path) -> TaskData:
    task = task_of("sst2", None)
    return read_task(task, find_parts(task, str(folder)))


def job(folder: Path, encoder: Path, out: Path, method: str = "svd", **changes: object) -> GlueJob:
    fields = {"way": load_recipe(method, keep=0.6), "seeds": (0,), "seq_len": 16, "calibration": 64, **changes}
    return GlueJob(
        open_source(str(encoder)),
        data_of(folder),
        dense=TUNE,
        recovery=TUNE,
        out=out,
        device=torch.device("cpu"),
        **fields,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("method", ["svd", "prune", "ffsplit"])
def test_a_run_learns_compresses_and_recovers(folder: Path, encoder: Path, tmp_path: Path, method: str) -> None:
    report = run_glue(job(folder, encoder, tmp_path / "out", method))
    phases = report["seeds"]["0"]
    assert phases["dense"]["scores"]["accuracy"] > 80
    assert phases["recovered"]["scores"]["accuracy"] > 80
    assert phases["recovered"]["parameters"] == phases["compressed"]["parameters"] < phases["dense"]["parameters"]
    assert json.loads((tmp_path / "out" / "ffsplit_glue.json").read_text())["summary"] == report["summary"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "seed-0" / "recovered")
    assert model.config.num_labels == 2
    test = encode(data_of(folder).report, byte_tokenizer(), 16)
    assert scores(model, task_of("sst2", None), test) == phases["recovered"]["scores"]


@pytest.mark.parametrize("method", ["prune", "ffsplit"])  # one stored plainly, one as sums
def test_a_student_made_before_takes_over_the_head(folder: Path, encoder: Path, tmp_path: Path, method: str) -> None:
    ids = torch.randint(5, 100, (8, 16), generator=torch.Generator().manual_seed(0))
    ffsplit.save(
        ffsplit.compress(str(encoder), recipe=load_recipe(method, keep=0.6), calibration=ids, device="cpu"),
        tmp_path / "student",
    )
    student = open_source(str(tmp_path / "student"))
    report = run_glue(job(folder, encoder, tmp_path / "out", way=student))
    phases, made = report["seeds"]["0"], tmp_path / "out" / "seed-0"
    assert report["student"] == str(tmp_path / "student")
    assert phases["recovered"]["scores"]["accuracy"] > 80
    assert phases["recovered"]["parameters"] == phases["compressed"]["parameters"] < phases["dense"]["parameters"]
    dense, compressed = (
        AutoModelForSequenceClassification.from_pretrained(made / phase) for phase in ("dense", "compressed")
    )
    body = student.load().base_model.state_dict()
    assert all(torch.equal(compressed.base_model.state_dict()[name], tensor) for name, tensor in body.items())
    assert torch.equal(compressed.classifier.weight, dense.classifier.weight)
    assert (made / "recovered" / "ffsplit_plan.json").is_file()
    with pytest.raises(ResumeError, match="another"):
        run_glue(job(folder, encoder, tmp_path / "out"))


def test_a_student_of_another_size_is_refused_before_training(folder: Path, encoder: Path, tmp_path: Path) -> None:
    other = saved(tiny_bert("AutoModel", hidden_size=48, num_attention_heads=4), tmp_path / "other")
    with pytest.raises(ModelError, match="hidden_size is 48"):
        run_glue(job(folder, encoder, tmp_path / "out", way=open_source(str(other))))
    assert not (tmp_path / "out").exists()


def test_masks_leave_a_checkpoint_of_the_budget(folder: Path, encoder: Path, tmp_path: Path) -> None:
    report = run_glue(job(folder, encoder, tmp_path / "out", way=Movement(0.5)))
    phases = report["seeds"]["0"]
    assert list(phases) == ["dense", "recovered"] == list(report["summary"])
    assert phases["recovered"]["budget"]["keep_ffn"] == pytest.approx(0.5, abs=0.02)
    assert phases["recovered"]["scores"]["accuracy"] > 80
    again = run_glue(job(folder, encoder, tmp_path / "out", way=Movement(0.5)))
    assert again["summary"] == report["summary"]
    short = replace(job(folder, encoder, tmp_path / "short", way=Movement(0.5)), recovery=replace(TUNE, epochs=0.1))
    with pytest.raises(FFSplitError, match="too few"):
        run_glue(short)
    assert not (tmp_path / "short").exists()


def test_a_killed_run_ends_where_another_one_does(folder: Path, encoder: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill_at(label: str, at: int) -> object:
        def progress(what: str, done: int, total: int) -> None:
            if what == label and done == at:
                raise Killed

        return progress

    whole = run_glue(job(folder, encoder, tmp_path / "whole"))
    for label, at in (("seed 0 dense", 17), ("seed 0 recovered", 17)):
        with pytest.raises(Killed):
            run_glue(job(folder, encoder, tmp_path / "killed", progress=kill_at(label, at)))
    parts = run_glue(job(folder, encoder, tmp_path / "killed"))
    assert parts["summary"] == whole["summary"]
    for name in ("dense", "recovered"):
        first, second = (
            load_file(tmp_path / run / "seed-0" / name / "model.safetensors") for run in ("whole", "killed")
        )
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_phase_goes_on_from_its_last_step(
    folder: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(folder)
    train, select = (encode(part, byte_tokenizer(), 16) for part in (data.train, data.select))
    steps: list[int] = []

    def run(stop: int | None) -> torch.Tensor:
        def progress(what: str, done: int, total: int) -> None:
            steps.append(done)
            if done == stop:
                raise KeyboardInterrupt

        model = load_classifier(open_source(str(encoder)), data, 0)
        hooks = Hooks(progress=progress, state=tmp_path / "state.safetensors", identity="this")
        fine_tune(model, data.task, train, select, TUNE, hooks=hooks)
        return torch.from_numpy(predict(model, select))

    straight = run(None)
    total = len(steps)
    monkeypatch.setattr("ffsplit.tasks.finetune.SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(21)
    steps.clear()
    torch.testing.assert_close(run(None), straight, rtol=0, atol=0)
    assert steps[0] in (21, 22)
    assert len(steps) <= total - 20
    steps.clear()
    run(None)
    assert len(steps) <= 2, "the state stays until the result is safe, and is all that a repetition needs"


def test_a_kill_before_the_checkpoint_is_written_loses_no_training(
    folder: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def die(*_arguments: object) -> None:
        raise Killed

    steps: list[int] = []
    monkeypatch.setattr("ffsplit.tasks.finetune.SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr("ffsplit.tasks.run._Seed._write", die)
        with pytest.raises(Killed):
            run_glue(job(folder, encoder, tmp_path))
    run_glue(
        job(folder, encoder, tmp_path, progress=lambda what, done, _: steps.append(done) if "dense" in what else None)
    )
    assert len(steps) <= 2
    assert not list(tmp_path.rglob("*.state.safetensors"))


def test_a_model_of_the_same_name_with_other_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    model = tiny_bert("AutoModel")
    place = saved(model, tmp_path / "bert")
    out = tmp_path / "out"
    claim(out, job(folder, place, out).identity())
    claim(out, job(folder, place, out).identity())
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(2)
    saved(model, place)
    with pytest.raises(ResumeError, match="another weights"):
        run_glue(job(folder, place, out))


def test_a_body_of_another_shape_is_refused_and_a_head_is_not(folder: Path, encoder: Path, tmp_path: Path) -> None:
    other = saved(tiny_bert("AutoModelForSequenceClassification", num_labels=5), tmp_path / "five")
    assert load_classifier(open_source(str(other)), data_of(folder), 0).classifier.out_features == 2
    config = json.loads((encoder / "config.json").read_text())
    wrong = tmp_path / "wrong"
    shutil.copytree(encoder, wrong)
    (wrong / "config.json").write_text(json.dumps({**config, "intermediate_size": 2 * config["intermediate_size"]}))
    with pytest.raises(FFSplitError, match=r"has the shape .* in the checkpoint"):
        load_classifier(open_source(str(wrong)), data_of(folder), 0)


def test_a_directory_of_another_run_is_refused(folder: Path, encoder: Path, tmp_path: Path) -> None:
    first = job(folder, encoder, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ffsplit_glue.json").write_text(json.dumps({**first.identity(), "seq_len": 12}))
    with pytest.raises(ResumeError, match="another seq_len: 12"):
        run_glue(first)


def test_weights_of_the_body_must_be_there(folder: Path, encoder: Path, tmp_path: Path) -> None:
    broken = saved(tiny_bert("AutoModel"), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("encoder.layer.0.intermediate.dense.weight")
    from safetensors.torch import save_file

    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FFSplitError, match="lacks weights"):
        load_classifier(open_source(str(broken)), data_of(folder), 0)


def test_command(cli: Call, folder: Path, encoder: Path, tmp_path: Path) -> None:  # noqa: F811
    command = ("glue", encoder, "--task", "sst2", "--data", folder, "--out", tmp_path / "out", "--keep", "0.5",
               "--epochs", "1", "--lr", "3e-3", "--seeds", "0,1", "--samples", "32", "--seq-len", "16")  # fmt: skip
    outcome = cli(*command)
    assert outcome.code == 0, outcome.err
    assert "recovered" in outcome.out
    assert "±" in outcome.out
    document = cli(*command, "--json").document  # nothing is done twice
    assert sorted(document["seeds"]) == ["0", "1"]
    assert document["summary"]["dense"]["accuracy"]["sd"] is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "sst3"), "must be one of"),
        (("--task", "sst2", "--seeds", "a"), "--seeds"),
        (("--task", "sst2", "--keep", "2"), "--keep"),
        (("--task", "sst2", "--keep", "0.0001"), "smallest reachable"),
        (("--task", "sst2", "--keep", "0.5", "--precision", "fp8"), "--precision"),
        (("--task", "sst2", "--keep", "0.5", "--epochs", "0"), "epochs"),
        (("--task", "sst2", "--keep", "0.5", "--distill", "2"), "distill"),
        (("--task", "sst2", "--keep", "0.5", "--columns", "text,label"), "needs the columns"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    cli: Call,  # noqa: F811
    folder: Path,
    encoder: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
) -> None:
    outcome = cli("glue", encoder, "--data", folder, "--out", tmp_path / "out", *options)
    assert outcome.code == 2, outcome.err
    assert message in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("values", [{"lr": 2.0}, {"lr": float("nan")}, {"epochs": float("inf")}])
def test_impossible_settings_are_refused_before_a_directory_is_taken(values: dict[str, float]) -> None:
    with pytest.raises(FFSplitError, match="fine-tuning"):
        TuneSettings(**values)  # type: ignore[arg-type]


def test_a_model_without_tokenizer_is_refused_before_a_directory_is_taken(folder: Path, tmp_path: Path) -> None:
    tiny_bert("AutoModel").save_pretrained(tmp_path / "bare")
    with pytest.raises(FFSplitError, match="no tokenizer"):
        run_glue(job(folder, tmp_path / "bare", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ['{"model": ', "[]"])
def test_a_damaged_record_is_named(folder: Path, encoder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "ffsplit_glue.json").write_text(content)
    with pytest.raises(ResumeError, match="damaged"):
        run_glue(job(folder, encoder, tmp_path))
    assert (tmp_path / "ffsplit_glue.json").read_text() == content


@pytest.mark.parametrize("names", [{}, {"pad_token": None, "eos_token": "<sep>"}])
def test_a_decoder_without_a_padding_token_gets_that_of_its_tokenizer(
    folder: Path, tmp_path: Path, names: dict[str, str | None]
) -> None:
    tokenizer = byte_tokenizer()
    for name, token in names.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(saved(build("AutoModel", "LlamaConfig"), tmp_path / "llama", tokenizer=False))
    small = {"dense": replace(TUNE, epochs=0.1), "recovery": replace(TUNE, epochs=0.1)}
    report = run_glue(replace(job(folder, tmp_path / "llama", tmp_path / "out"), **small))  # type: ignore[arg-type]
    assert set(report["summary"]) == {"dense", "compressed", "recovered"}
    config = json.loads((tmp_path / "out" / "seed-0" / "recovered" / "config.json").read_text())
    assert config["pad_token_id"] == tokenizer.convert_tokens_to_ids("<sep>" if names else "<pad>")


def test_a_run_that_began_no_phase_leaves_its_directory_free(folder: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(saved(build("AutoModel", "LlamaConfig"), tmp_path / "llama", tokenizer=False))
    with pytest.raises(FFSplitError, match="padding token"):
        run_glue(job(folder, tmp_path / "llama", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_failed_continuation_keeps_its_record(tmp_path: Path) -> None:
    claim(tmp_path, {"model": "one"})
    with pytest.raises(KeyError), claimed(tmp_path, {"model": "one"}):
        raise KeyError
    assert (tmp_path / "ffsplit_glue.json").is_file()


def test_a_student_that_is_not_compressed_is_refused(folder: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not less than"):
        run_glue(job(folder, encoder, tmp_path / "out", way=open_source(str(encoder))))
    assert not (tmp_path / "out").exists()


def test_masks_are_learned_while_a_classifier_is_fine_tuned(folder: Path, encoder: Path, tmp_path: Path) -> None:
    data = data_of(folder)
    parts = {name: encode(getattr(data, name), byte_tokenizer(), 16) for name in ("train", "select")}
    teacher = load_classifier(open_source(str(encoder)), data, 0)
    fine_tune(teacher, data.task, parts["train"], parts["select"], TUNE)

    class Killed(Exception):
        pass

    def die(_label: str, done: int, _total: int) -> None:
        if done == 17:
            raise Killed

    def masked(**hooks: object) -> tuple[PreTrainedModel, Standing]:
        model = copy.deepcopy(teacher)
        standing = fine_tune(
            model, data.task, parts["train"], parts["select"], TUNE, teacher=teacher,
            hooks=Hooks(**hooks), movement=Movement(0.5),  # type: ignore[arg-type]
        )  # fmt: skip
        return model, standing

    model, standing = masked()
    widths = [module.spec.neurons for module in sums_of(model).values()]
    assert sum(widths) == pytest.approx(sum(module.spec.neurons for module in as_sums(teacher).values()) / 2, abs=2)
    assert scores(model, data.task, parts["select"])["accuracy"] == pytest.approx(standing.best, abs=1e-3)
    assert standing.best_step > 21
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ffsplit.tasks.finetune.SAVE_SECONDS", 0.0)
        with pytest.raises(Killed):
            masked(state=tmp_path / "state", progress=die)
    again, _ = masked(state=tmp_path / "state")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
