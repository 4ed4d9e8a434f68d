"""``ffsplit glue``: fine-tune, make smaller, fine-tune what is left, and measure, for one or more seeds.

Every phase ends in a checkpoint that appears whole or not at all, and its scores in a file beside it. A repeated call
goes on after the last of them, and inside a phase where it was killed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ffsplit.checkpoint.reload import reload_and_compare
from ffsplit.checkpoint.save import publish, save, staged
from ffsplit.errors import DataError, ResumeError
from ffsplit.evaluate.size import size_of
from ffsplit.families import find_ffns
from ffsplit.files import read_object, write_whole
from ffsplit.pipeline.compress import check_plan, compress, refuse_compressed, shapes_of
from ffsplit.pipeline.job import budget_of, linear_parameters
from ffsplit.pipeline.load import Source
from ffsplit.pipeline.plan import make_plan
from ffsplit.pipeline.recipe import ALL_NEURONS, Recipe, load_recipe
from ffsplit.pipeline.result import PLAN_FILE, RECIPE_FILE, REPORT_FILE
from ffsplit.plain import plain
from ffsplit.provenance import hash_model, provenance
from ffsplit.recover.weights import specs_of
from ffsplit.tasks.classifier import calibration_batches, load_classifier
from ffsplit.tasks.encode import Encoded, encode, give_padding
from ffsplit.tasks.examples import TaskData
from ffsplit.tasks.finetune import TuneSettings, fine_tune, scores, steps_of
from ffsplit.tasks.student import check_student, load_student
from ffsplit.train.loop import Hooks
from ffsplit.train.movement import Movement, budgets_for

Progress = Callable[[str, int, int], None]
Phase = Literal["dense", "compressed", "recovered"]
RUN_FILE = "ffsplit_glue.json"


@dataclass(frozen=True)
class GlueJob:
    """One call of ``ffsplit glue``.

    Attributes:
        source: the dense encoder.
        data: of the task.
        way: how it is made smaller. A recipe: after it was fine-tuned, calibrated on the task's training texts. Another
            source: by that checkpoint, which was compressed (and recovered on any text) before the task was seen; it
            takes over the fine-tuned head. Movement: by masks that are learned during the second fine-tuning.
        dense: how the dense encoder is fine-tuned.
        recovery: how the compressed one is, with the dense one as its teacher if ``distill`` or ``hidden`` is above 0.
        out: directory of everything that is written.
        seeds: of the heads, the orders of the examples and dropout.
        device: to train and fit on.
        seq_len: tokens per example at most.
        calibration: training examples that the fits look at.
        progress: called with (what, done, total).
    """

    source: Source
    data: TaskData
    way: Recipe | Source | Movement
    dense: TuneSettings
    recovery: TuneSettings
    out: Path
    seeds: tuple[int, ...]
    device: torch.device
    seq_len: int = 128
    calibration: int = 2048
    progress: Progress | None = None

    @cached_property
    def _weights(self) -> str:
        """A fingerprint of the dense encoder: a name alone may stand for another one by the time of a continuation."""
        return hash_model(self.source.load())

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Masks leave no model between the dense and the final one."""
        return ("dense", "recovered") if isinstance(self.way, Movement) else ("dense", "compressed", "recovered")

    @cached_property
    def _way(self) -> dict[str, Any]:
        """How the encoder is made smaller, in plain values; a student's weights are read once for it."""
        if isinstance(self.way, Recipe):
            return {"recipe": self.way.model_dump(mode="json")}
        if isinstance(self.way, Movement):
            return {"masks": asdict(self.way)}
        return {"student": self.way.name, "student_weights": hash_model(self.way.load())}

    def identity(self) -> dict[str, Any]:
        """What an interrupted run and its continuation must share; further seeds may be added."""
        shown: dict[str, Any] = plain(
            {
                "model": self.source.name,
                "weights": self._weights,
                "task": self.data.task.name,
                "data": self.data.describe(),
                **self._way,
                "dense": asdict(replace(self.dense, seed=0)),
                "recovery": asdict(replace(self.recovery, seed=0)),
                "seq_len": self.seq_len,
                "calibration": self.calibration,
            }
        )
        return shown


def run_glue(job: GlueJob) -> dict[str, Any]:
    """Do whatever is not done yet; the report, as plain values, is also written to ``ffsplit_glue.json``.

    Returns:
        per phase the task's metrics times 100: every seed's, their mean, and their standard deviation.

    Raises:
        ResumeError: the directory holds the phases of another run.
        FFSplitError: the model, the recipe or the data do not fit; before anything is trained.
    """
    _check_model(job)
    tokenizer = job.source.tokenizer()
    if tokenizer is None:
        raise DataError(f"{job.source.name}: has no tokenizer, which the task's texts need")
    give_padding(tokenizer)
    parts = {"train": job.data.train, "select": job.data.select, "report": job.data.report}
    with claimed(job.out, job.identity()):
        encoded = {name: encode(part, tokenizer, job.seq_len).to(job.device) for name, part in parts.items()}
        results = {seed: _Seed(job, seed, encoded, tokenizer).run() for seed in job.seeds}
    report = {
        **job.identity(),
        "seeds": {str(seed): result for seed, result in results.items()},
        "summary": {phase: summary([result[phase]["scores"] for result in results.values()]) for phase in job.phases},
        "provenance": provenance(seed=job.seeds[0]),
    }
    _write_json(job.out / RUN_FILE, plain(report))
    return report


@contextmanager
def claimed(out: Path, identity: dict[str, Any]) -> Iterator[None]:
    """:func:`claim` a directory, which is free again after an error before the first phase left anything."""
    new = not (out / RUN_FILE).is_file()
    claim(out, identity)
    try:
        yield
    except BaseException:
        if new and not any(out.glob("seed-*")):
            (out / RUN_FILE).unlink()
            if not any(out.iterdir()):
                out.rmdir()
        raise


def claim(out: Path, identity: dict[str, Any]) -> None:
    """Take a directory for a run, or go on with the same one in it.

    Raises:
        ResumeError: it holds another run, whose first setting that differs is named, or a damaged record.
    """
    file = out / RUN_FILE
    if file.is_file():
        stored = read_object(file, "remove it, or choose another --out")
        for name, value in identity.items():
            if stored.get(name) != value:
                raise ResumeError(
                    f"{out}: holds a run with another {name}: {json.dumps(stored.get(name))[:200]}; choose "
                    "another --out"
                )
        return
    out.mkdir(parents=True, exist_ok=True)
    _write_json(file, identity)


def _write_json(file: Path, content: Any) -> None:
    write_whole(file, json.dumps(content, indent=1) + "\n")


def summary(results: Sequence[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean and sample standard deviation (None of one seed) of every metric."""
    columns = {name: [result[name] for result in results] for name in results[0]}
    return {
        name: {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None}
        for name, values in columns.items()
    }


def _check_model(job: GlueJob) -> None:
    """Refuse what cannot work before anything is trained."""
    refuse_compressed(job.source.config, job.source.name)
    skeleton = job.source.skeleton()
    found = find_ffns(skeleton)
    shapes = shapes_of(skeleton, found)
    if isinstance(job.way, Recipe):
        check_plan(found, shapes, job.way)
    elif isinstance(job.way, Movement):
        job.way.window(steps_of(job.recovery, len(job.data.train)))
        everything = load_recipe(ALL_NEURONS).methods_for(len(shapes))
        budgets_for({ffn.name: ffn.spec for ffn in make_plan(found.sites, shapes, everything).ffns}, job.way)
    else:
        check_student(job.way, job.source, sum(shape.parameters for shape in shapes))


@dataclass
class _Seed:
    """All phases of one seed."""

    job: GlueJob
    seed: int
    encoded: dict[str, Encoded]
    tokenizer: Any

    @property
    def folder(self) -> Path:
        return self.job.out / f"seed-{self.seed}"

    def run(self) -> dict[str, Any]:
        make: dict[Phase, Callable[[Path], dict[str, Any]]] = {
            "dense": self._make_dense,
            "compressed": self._make_compressed,
            "recovered": self._make_recovered,
        }
        return {phase: self._phase(phase, make[phase]) for phase in self.job.phases}

    def _phase(self, phase: Phase, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The phase's record; what is there already is not made again."""
        target, note = self.folder / phase, self.folder / f"{phase}.json"
        if target.is_dir() and note.is_file():
            return read_object(note, "remove it to measure again")
        facts = {} if target.is_dir() else make(target)
        model = self._load(phase)
        facts |= {
            "scores": scores(model, self.job.data.task, self.encoded["report"]),
            "parameters": size_of(model).parameters,
        }
        _write_json(note, plain(facts))
        self._state(phase).unlink(missing_ok=True)
        return facts

    def _state(self, phase: Phase) -> Path:
        """The file of a training under way, kept until its result is safe."""
        return self.folder / f"{phase}.state.safetensors"

    def _load(self, phase: Phase) -> PreTrainedModel:
        model = AutoModelForSequenceClassification.from_pretrained(self.folder / phase, dtype=torch.float32)
        return model.to(self.job.device).eval()  # type: ignore[no-any-return]

    def _make_dense(self, target: Path) -> dict[str, Any]:
        model = load_classifier(self.job.source, self.job.data, self.seed, self.tokenizer.pad_token_id)
        facts = self._tune("dense", model.to(self.job.device), self.job.dense, None)
        self._write(model, target, None)
        return facts

    def _make_compressed(self, target: Path) -> dict[str, Any]:
        job = self.job
        if isinstance(job.way, Source):
            student = load_student(job.way, job.data, self._load("dense"))
            self._write(student, target, Path(job.way.location))
            return {}
        assert isinstance(job.way, Recipe)
        journal = self.folder / "compressed.ffsplit-journal"
        result = compress(
            self._load("dense").cpu(),
            self.tokenizer,
            recipe=job.way,
            calibration=calibration_batches(self.encoded["train"], job.calibration),
            device=job.device,
            seed=self.seed,
            journal=journal,
            progress=job.progress,
        )
        save(result, target)
        shutil.rmtree(journal, ignore_errors=True)
        return {"budget": result.report["budget"]}

    def _make_recovered(self, target: Path) -> dict[str, Any]:
        settings = self.job.recovery
        teacher = self._load("dense") if settings.distill > 0 or settings.hidden > 0 else None
        if isinstance(self.job.way, Movement):
            return self._make_narrower(target, self.job.way, teacher)
        model = self._load("compressed")
        facts = self._tune("recovered", model, settings, teacher)
        self._write(model, target, self.folder / "compressed")
        return facts

    def _make_narrower(self, target: Path, movement: Movement, teacher: PreTrainedModel | None) -> dict[str, Any]:
        job, model = self.job, self._load("dense").cpu()
        sizes = linear_parameters(model), size_of(model).parameters
        texts = calibration_batches(self.encoded["train"], 1)  # nothing is fitted
        result = compress(model, self.tokenizer, recipe=ALL_NEURONS, calibration=texts, device=job.device)
        model = result.model.to(job.device)
        facts = self._tune("recovered", model, job.recovery, teacher, movement)
        plan = result.plan.with_specs(specs_of(model))
        made = {"masks": asdict(movement), **facts}
        report = {**result.report, "budget": budget_of(plan, *sizes), "fine_tuning": made}
        save(replace(result, model=model.cpu(), plan=plan, report=plain(report)), target)
        return {"budget": report["budget"], **facts}

    def _tune(
        self,
        phase: Phase,
        model: PreTrainedModel,
        settings: TuneSettings,
        teacher: PreTrainedModel | None,
        movement: Movement | None = None,
    ) -> dict[str, Any]:
        identity = hashlib.sha256(json.dumps(self.job.identity(), sort_keys=True).encode()).hexdigest()
        hooks = Hooks(
            progress=self.job.progress,
            label=f"seed {self.seed} {phase}",
            state=self._state(phase),
            identity=f"{identity} {self.seed} {phase}",
        )
        trained = fine_tune(
            model,
            self.job.data.task,
            self.encoded["train"],
            self.encoded["select"],
            replace(settings, seed=self.seed),
            teacher=teacher,
            hooks=hooks,
            movement=movement,
        )
        return {"training": asdict(trained)}

    def _write(self, model: PreTrainedModel, target: Path, compressed: Path | None) -> None:
        """A checkpoint with the structure files of the one that it was trained or made from."""
        with staged(target) as staging:
            model.save_pretrained(staging)
            self.tokenizer.save_pretrained(staging)
            for name in (PLAN_FILE, RECIPE_FILE, REPORT_FILE):
                if compressed is not None and (compressed / name).is_file():
                    shutil.copy(compressed / name, staging / name)
            reload_and_compare(model, staging)
            publish(staging, target)
