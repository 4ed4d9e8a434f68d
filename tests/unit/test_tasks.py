"""GLUE's tasks: columns, labels and parts of local files and of the hub, metrics, and batches."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from ffsplit.errors import DataError
from ffsplit.tasks import parts as parts_module
from ffsplit.tasks.encode import Epochs, encode
from ffsplit.tasks.examples import Examples, TaskData, read_task
from ffsplit.tasks.metrics import METRICS, measure
from ffsplit.tasks.parts import find_parts
from ffsplit.tasks.task import GLUE, task_of
from tests.unit.evaluate_helpers import byte_tokenizer

LABELS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=40)


@given(LABELS)
def test_label_metrics_are_those_of_sklearn(pairs: list[tuple[int, int]]) -> None:
    predicted, true = np.array(pairs).T
    assert METRICS["accuracy"](predicted, true) == pytest.approx(reference.accuracy_score(true, predicted))
    if len({*predicted, *true}) > 1:  # sklearn warns of a single class
        assert METRICS["matthews"](predicted, true) == pytest.approx(reference.matthews_corrcoef(true, predicted))
    once = reference.f1_score(true == 1, predicted == 1, zero_division=0)
    assert METRICS["f1"](predicted, true) == pytest.approx(once)


def test_measures_of_a_regression_and_of_outputs_that_are_no_numbers() -> None:
    outputs, true = np.array([[1.0], [2.0], [4.0]]), np.array([0.0, 1.0, 3.0])
    assert measure(GLUE["stsb"], outputs, true) == {"spearman": pytest.approx(100), "pearson": pytest.approx(100)}
    with pytest.raises(DataError, match="not finite"):
        measure(GLUE["sst2"], np.array([[np.nan, 0.0]]), np.array([0]))


def test_glue_has_nine_tasks_and_names_the_nearest() -> None:
    assert sorted(GLUE) == ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]
    assert {name for task in GLUE.values() for name in task.metrics} == set(METRICS)
    with pytest.raises(DataError, match="did you mean 'sst2'"):
        task_of("sst-2", None)
    with pytest.raises(DataError, match="text,label"):
        task_of("mine", "text")


def test_columns_of_ones_own_replace_those_of_a_task() -> None:
    assert task_of("qnli", "a,b,c").columns == (("a", "b", "c"),)
    assert task_of("qnli", "a,b,c").classes == ("entailment", "not_entailment")
    assert task_of("scores", "a,y", regression=True).metrics == ("spearman", "pearson")


def test_parts_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", "sentence\tlabel", *(f"text {n}\t{n % 2}" for n in range(40)))
    write(tmp_path / "dev.tsv", "sentence\tlabel", "fine \t1", "bad\t0")
    write(tmp_path / "test.tsv", "index\tsentence", "0\thidden")
    data = read(tmp_path, "sst2")
    assert (len(data.train), len(data.select), len(data.report)) == (36, 4, 2)
    assert data.report.first == ("fine ", "bad")
    assert data.classes == ("0", "1")
    write(tmp_path / "test.tsv", "sentence\tlabel", "shown\t1", "told\t0")
    data = read(tmp_path, "sst2", limit=10)
    assert (len(data.train), data.select.name, data.report.name) == (10, "dev.tsv", "test.tsv")


def test_files_without_a_header_and_without_a_training_part(tmp_path: Path) -> None:
    """The STS benchmark as it is given out (and AG News): columns by number."""
    for part in ("train", "dev", "test"):
        rows = (f'main\tMSR\t2012\t{n}\t{n % 5}.25\tA “quoted\t"text {n}' for n in range(6))
        write(tmp_path / f"sts-{part}.csv", *rows)
    data = read(tmp_path, "stsb")
    assert data.report.second is not None
    assert (data.report.first[1], data.report.second[1], float(data.report.labels[1])) == ("A “quoted", '"text 1', 1.25)
    news = tmp_path / "news"
    news.mkdir()
    for part in ("dev", "test"):
        write(news / f"{part}.tsv", *(f"story {n}\t{'Sports' if n % 2 else 'World'}" for n in range(30)))
    data = read(news, "agnews", "0,1")
    assert (data.classes, len(data.train), len(data.select), len(data.report)) == (("Sports", "World"), 27, 3, 30)


def test_records_and_names_of_labels(tmp_path: Path) -> None:
    rows = [{"premise": "a", "hypothesis": "b", "label": label} for label in ("neutral", 2, "0")]
    for name in ("train", "dev_matched", "dev_mismatched"):
        write(tmp_path / f"{name}.jsonl", *(json.dumps(row) for row in rows * 4))
    data = read(tmp_path, "mnli")
    assert data.report.name == "dev_matched.jsonl"
    assert data.report.labels.tolist()[:3] == [1, 2, 0]


def test_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"idx": [0, 1], "sentence": ["a", "b"], "label": [1, 0]})
    for part in ("train", "dev", "test"):
        parquet.write_table(table, tmp_path / f"{part}-00000-of-00001.parquet")
    data = read(tmp_path, "sst2")
    assert (data.train.first, data.train.labels.tolist()) == (("a", "b"), [1, 0])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ["sentence\tlabel", "a\t0", "b\tx", "c\ty", "d\t0", "e\tx", "f\ty"],
            "label of record 1 is 'z'; it must be one of 0, x, y",
        ),
        (["sentence\tlabel", "a\t0", "b\t0"], "all labels are '0'"),
        (["sentence\tlabel", *(f"a\t{n}.5" for n in range(9))], "9 distinct labels in 9 examples"),
        (["text\tlabel", "a\t0"], "sst2 needs the columns sentence,label; there are 'text', 'label'"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, rows: list[str], message: str) -> None:
    write(tmp_path / "train.tsv", *rows)
    write(tmp_path / "dev.tsv", "sentence\tlabel", "a\t0", "a\t0")
    write(tmp_path / "test.tsv", "sentence\tlabel", "a\tz")
    with pytest.raises(DataError, match=message):
        read(tmp_path, "sst2")


def test_places_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no part"):
        read(tmp_path, "sst2")
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "nothing", "sst2")
    write(tmp_path / "train.tsv", "sentence\tlabel", "a\t0")
    write(tmp_path / "train.csv", "sentence,label", "a,0")
    with pytest.raises(DataError, match="keep one"):
        read(tmp_path, "sst2")


class Rows(list[dict[str, Any]]):
    """What ``datasets.load_dataset`` returns, as far as it is used."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])


class Hub:
    """A dataset library that has GLUE's SST-2."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None, str]] = []

    def get_dataset_split_names(self, name: str, config: str | None) -> list[str]:
        if name != "nyu-mll/glue":
            raise ConnectionError(f"no dataset {name}")
        return ["train", "validation", "test"]

    def load_dataset(self, name: str, config: str | None, split: str) -> Rows:
        self.asked.append((name, config, split))
        hidden = split == "test"
        return Rows({"sentence": f"{split} {n}", "label": -1 if hidden else n % 2, "idx": n} for n in range(20))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(parts_module, "importlib", SimpleNamespace(import_module=lambda name: made))
    return made


def test_the_hub_reports_on_validation_because_its_test_labels_are_hidden(hub: Hub) -> None:
    data = read("hub", "sst2")
    assert data.report.name == "nyu-mll/glue:sst2@validation"
    assert (len(data.train), len(data.select), len(data.report)) == (18, 2, 20)
    assert ("nyu-mll/glue", "sst2", "train") in hub.asked
    assert set(data.train.first) | set(data.select.first) == {f"train {n}" for n in range(20)}


def test_what_the_hub_does_not_have_is_refused(hub: Hub) -> None:
    with pytest.raises(DataError, match="ConnectionError: no dataset someone/else"):
        read("someone/else", "sst2")
    with pytest.raises(DataError, match="holds GLUE's tasks"):
        read("hub", "mine", "a,b")


def test_every_epoch_sees_every_example_once_with_its_like() -> None:
    lengths = np.arange(103) % 50 + 3
    epochs = Epochs(lengths, batch_size=10, seed=1)
    first = [epochs.rows(step) for step in range(epochs.steps)]
    second = [epochs.rows(step) for step in range(epochs.steps, 2 * epochs.steps)]
    for epoch in (first, second):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(103))
        assert max(np.ptp(lengths[rows]) for rows in epoch) < 12
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    again = Epochs(lengths, batch_size=10, seed=1)
    assert np.array_equal(again.rows(epochs.steps + 3), second[3])  # of a restarted run


def test_batches_carry_no_padding_that_none_needs() -> None:
    examples = Examples(("a", "b" * 11, "c" * 40), None, np.array([0, 1, 0]), "here")
    encoded = encode(examples, byte_tokenizer(), 24)
    assert encoded.lengths.tolist() == [3, 13, 24]
    inputs, labels, rows = encoded.batch(np.array([1, 0]))
    assert inputs["input_ids"].shape == (2, 16)
    assert inputs["attention_mask"].sum(1).tolist() == [13, 3]
    assert (labels.tolist(), rows.tolist()) == ([1, 0], [1, 0])


def write(file: Path, *lines: str) -> None:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(place: Path | str, name: str, columns: str | None = None, limit: int | None = None) -> TaskData:
    task = task_of(name, columns)
    return read_task(task, find_parts(task, str(place)), limit)
