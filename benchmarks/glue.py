"""The paper's own experiment: encoders on GLUE-style tasks with most of their FFN parameters removed.

Every row: fine-tune the dense encoder; compress its FFNs on the task's training text; fine-tune what is left; measure
on the part that nothing was chosen on. Rows that the results file has already are skipped, so a run that was cut off
goes on when it is repeated. The order is that of importance.

    python benchmarks/glue.py [--device cuda] [--only PATTERN] [--seconds 330] [--out glue-gpu]
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

import ffsplit
from _common import RESULTS, data_folder, minilm, mpnet_folder, sentence_encoder_check, write_result
from _glue_ways import GENERAL, WAYS, Row, Way, keep_of, recipe_for, rows
from ffsplit.calibrate.tokens import TokenWindows
from ffsplit.pipeline.load import open_source
from ffsplit.pipeline.result import CompressionResult
from ffsplit.provenance import provenance
from ffsplit.recover.weights import sums_of
from ffsplit.tasks.classifier import calibration_batches, load_classifier
from ffsplit.tasks.encode import Encoded, encode
from ffsplit.tasks.examples import TaskData, read_task
from ffsplit.tasks.finetune import TuneSettings, fine_tune, scores
from ffsplit.tasks.parts import find_parts
from ffsplit.tasks.task import task_of
from ffsplit.train.loop import Precision
from ffsplit.train.movement import Movement
from glue_general import General, calibration, distil, windows
from glue_pairs import joined, judged, pairs

ENCODERS = {"minilm": ("all-MiniLM-L6-v2", minilm), "mpnet": ("all-mpnet-base-v2", mpnet_folder)}
# Peak learning rate of the fine-tuning, dense and compressed alike.
LEARNING_RATES = {"minilm": 1e-4, "mpnet": 5e-5}
FOLDERS = {"stsb": "stsb", "sst2": "sst2", "agnews": "agnews"}
COLUMNS = {"agnews": "0,1"}
TRAIN_LIMIT = {"sst2": 20_000}
EPOCHS = {"stsb": 4.0, "sst2": 2.0, "agnews": 1.0}
BATCH, SEQ_LEN, CALIBRATION = 64, 128, 2048
PAIRS, PAIRS_BATCH = 30_000, 128


def compression_facts(result: CompressionResult, recipe: dict[str, Any], seconds: float) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "keep_ffn": result.plan.keep,
        "keep_model": result.report["budget"]["keep_model"],
        "seconds_compression": round(seconds, 1),
    }


@dataclass(frozen=True)
class Limits:
    """How much of everything; smaller than the defaults only to try the script out."""

    train: int | None = None
    epochs: float | None = None
    calibration: int = CALIBRATION
    evaluate: int | None = None
    precision: Precision = "float32"
    pairs: int = PAIRS
    general: General = field(default_factory=General)


class Bench:
    """Data and fine-tuned dense models, each made once."""

    def __init__(self, device: torch.device, limits: Limits) -> None:
        self.device, self.limits = device, limits
        self.task_data = lru_cache(maxsize=None)(self._task_data)
        self.encoded = lru_cache(maxsize=4)(self._encoded)
        self.dense = lru_cache(maxsize=8)(self._dense)
        self.text = lru_cache(maxsize=None)(self._text)
        self.body = lru_cache(maxsize=1)(self._body)
        self.more = lru_cache(maxsize=4)(self._more)

    def _task_data(self, task: str) -> TaskData:
        wanted = task_of(task, COLUMNS.get(task))
        limit = TRAIN_LIMIT.get(task) if self.limits.train is None else self.limits.train
        return read_task(wanted, find_parts(wanted, str(data_folder() / FOLDERS[task])), limit)

    def _encoded(self, encoder: str, task: str) -> dict[str, Encoded]:
        data, tokenizer = self.task_data(task), open_source(str(ENCODERS[encoder][1]())).tokenizer()
        few = np.arange(self.limits.evaluate) if self.limits.evaluate else None
        parts = {"train": data.train, "select": data.select, "report": data.report}
        if few is not None:
            parts |= {
                name: parts[name].take(few, f"{parts[name].name}, first {len(few)}") for name in ("select", "report")
            }
        return {name: encode(part, tokenizer, SEQ_LEN).to(self.device) for name, part in parts.items()}

    def _more(self, encoder: str, task: str, seed: int) -> Encoded:
        """Training examples, and pairs of their sentences that the dense model of this seed labels."""
        source = open_source(str(ENCODERS[encoder][1]()))
        tokenizer, body = source.tokenizer(), source.load(torch.float32).base_model.to(self.device)
        found = encode(pairs(self.task_data(task).train, body, tokenizer, self.limits.pairs, seed), tokenizer, SEQ_LEN)
        dense, _ = self.dense(encoder, task, seed)
        return joined(self.encoded(encoder, task)["train"], judged(found.to(self.device), dense, self.limits.precision))

    def settings(self, encoder: str, task: str, seed: int) -> TuneSettings:
        return TuneSettings(
            epochs=self.limits.epochs or EPOCHS[task],
            lr=LEARNING_RATES[encoder],
            batch_size=BATCH,
            seed=seed,
            distill=0.5,
            hidden=1.0,
            precision=self.limits.precision,
        )

    def _dense(self, encoder: str, task: str, seed: int) -> tuple[PreTrainedModel, dict[str, Any]]:
        data, parts = self.task_data(task), self.encoded(encoder, task)
        model = load_classifier(open_source(str(ENCODERS[encoder][1]())), data, seed).to(self.device)
        trained = fine_tune(model, data.task, parts["train"], parts["select"], self.settings(encoder, task, seed))
        return model, {"training": asdict(trained), "scores": scores(model, data.task, parts["report"])}

    def run(self, row: Row) -> dict[str, Any]:
        started = time.perf_counter()
        dense, facts = self.dense(row.encoder, row.task, row.seed)
        way = WAYS[row.way]
        if way.again:
            facts = self._trained_again(row, copy.deepcopy(dense), None)
        elif way.masks:
            facts = self._masked(row, dense)
        elif way.recipe is not None:
            facts = self._compressed(row, way, dense)
        return {**asdict(row), "name": row.name, **facts, "seconds": round(time.perf_counter() - started, 1)}

    def _text(self, encoder: str) -> TokenWindows:
        return windows(open_source(str(ENCODERS[encoder][1]())).tokenizer())

    def _body(self, encoder: str, budget: str, recipe: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The encoder without a task: compressed and distilled on text of no task."""
        # Some checkpoints load with a head on: only the encoder goes into the classifier.
        teacher, text = open_source(str(ENCODERS[encoder][1]())).load(torch.float32).base_model, self.text(encoder)
        wanted = recipe_for(json.loads(recipe), keep_of(teacher, encoder, budget))
        batches = calibration(text, self.limits.calibration)
        started = time.perf_counter()
        result = ffsplit.compress(copy.deepcopy(teacher), recipe=wanted, calibration=batches, device=self.device)
        fitted = time.perf_counter() - started
        student = result.model.to(self.device)
        notes = distil(student, teacher.to(self.device), text, self.limits.general, seed=0)
        print(f"{encoder} {budget}: {notes['held_out_losses']} in {notes['seconds']} s", flush=True)
        return student, {**compression_facts(result, wanted, fitted), "general_distillation": notes}

    def _compressed(self, row: Row, way: Way, dense: PreTrainedModel) -> dict[str, Any]:
        data, parts = self.task_data(row.task), self.encoded(row.encoder, row.task)
        if way.general:
            body, facts = self.body(row.encoder, row.budget, json.dumps(way.recipe))
            model = copy.deepcopy(dense)
            setattr(model, model.base_model_prefix, copy.deepcopy(body))
        else:
            assert way.recipe is not None
            recipe = recipe_for(way.recipe, keep_of(dense, row.encoder, row.budget))
            text = calibration_batches(parts["train"], self.limits.calibration)
            started = time.perf_counter()
            result = ffsplit.compress(
                copy.deepcopy(dense).cpu(), recipe=recipe, calibration=text, device=self.device, seed=row.seed
            )
            facts = compression_facts(result, recipe, time.perf_counter() - started)
            model = result.model.to(self.device)
        before = scores(model, data.task, parts["report"])
        return {
            **facts,
            "distilled": way.distill,
            "scores_before_training": before,
            **self._trained_again(row, model, dense if way.distill else None),
        }

    def _masked(self, row: Row, dense: PreTrainedModel) -> dict[str, Any]:
        model, whole = copy.deepcopy(dense), sum(parameter.numel() for parameter in dense.parameters())
        movement = Movement(keep_of(dense, row.encoder, row.budget))
        facts = self._trained_again(row, model, dense, movement)
        widths = {name: module.spec.branches[0].neurons for name, module in sums_of(model).items()}
        left = sum(parameter.numel() for parameter in model.parameters())
        return {"recipe": asdict(movement), "keep_model": left / whole, "widths": widths, "distilled": True, **facts}

    def _trained_again(
        self, row: Row, model: PreTrainedModel, teacher: PreTrainedModel | None, movement: Movement | None = None
    ) -> dict[str, Any]:
        data, parts = self.task_data(row.task), self.encoded(row.encoder, row.task)
        settings, examples = self.settings(row.encoder, row.task, row.seed), parts["train"]
        if WAYS[row.way].pairs:
            settings, examples = (
                replace(settings, batch_size=PAIRS_BATCH),
                self.more(row.encoder, row.task, row.seed),
            )
        trained = fine_tune(model, data.task, examples, parts["select"], settings, teacher=teacher, movement=movement)
        return {
            "examples": len(examples),
            "training": asdict(trained),
            "scores": scores(model, data.task, parts["report"]),
        }


def protocol(bench: Bench) -> dict[str, Any]:
    return {
        "fine-tuning": {
            "epochs": EPOCHS, "batch_size": BATCH, "lr": LEARNING_RATES, "seq_len": SEQ_LEN, **asdict(bench.limits),
            "optimizer": "AdamW, weight decay 0.01 on matrices, 10 % warm-up, linear decay, clipped at norm 1",
            "best": "the epoch that scores best on the part that is selected on",
        },
        "distillation": "0.5 labels + 0.5 outputs of the fine-tuned dense model + 1.0 hidden states of all layers",
        "distillation without a task": f"{GENERAL}: hidden states of all layers, on text of no task; fine-tuned once",
        "more pairs": f"ways '...-pairs': {bench.limits.pairs} pairs of the training part's sentences by similarity, "
        f"labelled by the fine-tuned dense model; batches of {PAIRS_BATCH}",
        "calibration": f"{bench.limits.calibration} training examples, drawn once",
        "train_limit": TRAIN_LIMIT,
        "weights": "rounded to float16 on the way to the GPU machine" if bench.device.type != "cpu" else "as published",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="regular expression that a row's name must contain")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after this time")
    parser.add_argument("--out", default="glue-cpu", help="name of the results file")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--precision", default="float32", choices=("float32", "tf32", "bfloat16"))
    parser.add_argument("--limit", type=int, help="train on so many examples")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--calibration", type=int, default=CALIBRATION)
    parser.add_argument("--evaluate", type=int, help="select and report on so many examples (to try the script out)")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of training sentences, labelled by the dense model")
    parser.add_argument("--general-minutes", type=float, default=General.minutes, help="of distillation on plain text")
    parser.add_argument("--general-steps", type=int, default=General.steps)
    parser.add_argument("--no-check", action="store_true", help="skip the check of the encoders' embeddings")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    device = torch.device(options.device)
    general = General(options.general_minutes, options.general_steps)
    limits = Limits(
        options.limit, options.epochs, options.calibration, options.evaluate, options.precision, options.pairs, general
    )
    bench = Bench(device, limits)
    file = options.folder / f"{options.out}.json"
    document = json.loads(file.read_text()) if file.is_file() else {"benchmark": "glue", "checks": {}, "rows": []}
    document |= {"protocol": protocol(bench), "data": document.get("data", {})}
    done = {row["name"] for row in document["rows"]}
    wanted = [row for row in dict.fromkeys(rows()) if re.search(options.only, row.name) and row.name not in done]
    for encoder in () if options.no_check else dict.fromkeys(row.encoder for row in wanted):
        if encoder not in document["checks"]:
            title, folder = ENCODERS[encoder]
            document["checks"][encoder] = {"model": title, **sentence_encoder_check(folder(), device)}
            print(encoder, document["checks"][encoder], flush=True)
    failed: list[str] = []
    for row in wanted:
        if time.perf_counter() - started > options.seconds:
            print("out of time; repeat to go on", flush=True)
            break
        try:
            result = bench.run(row)
        except Exception:  # one row that fails must not cost the others their time on a borrowed machine
            traceback.print_exc()
            failed.append(row.name)
            continue
        document["rows"].append(result)
        document["data"][row.task] = bench.task_data(row.task).describe()
        document["provenance"] = provenance(seed=row.seed)
        write_result(options.out, document, options.folder)
        told = ", ".join(f"{name} {value:.2f}" for name, value in result["scores"].items())
        print(
            f"{row.name:44s} {told} in {result['seconds']:.1f} s, at {time.perf_counter() - started:.0f} s", flush=True
        )
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
