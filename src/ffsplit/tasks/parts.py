"""Where the parts of a task lie: training, selection and report, in a folder of files or in a dataset of the hub."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ffsplit.calibrate.records import RECORD_SUFFIXES, data_suffix, table_rows
from ffsplit.errors import DataError
from ffsplit.tasks.task import GLUE, Task

HUB = "nyu-mll/glue"
_TRAIN, _DEV, _TEST = ("train", "training"), ("dev", "validation", "valid", "val"), ("test",)
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+|[\w.-]+)(:(?P<config>[\w.+-]+))?")
Columns = tuple[str, str | None, str]


class Part(Protocol):
    """Rows of one part of a data set."""

    @property
    def name(self) -> str:
        """What a report calls it."""

    def open(self, task: Task) -> tuple[Columns, Iterator[Mapping[str, Any]]]:
        """The columns that the task finds there, and the rows; DataError if it finds none of its own."""


@dataclass(frozen=True)
class Files:
    """One part in one or more files of one kind."""

    paths: tuple[Path, ...]

    @property
    def name(self) -> str:
        return "+".join(path.name for path in self.paths)

    def open(self, task: Task) -> tuple[Columns, Iterator[Mapping[str, Any]]]:
        columns = _columns_of(self.paths[0], task)
        return columns, (row for path in self.paths for row in table_rows(path, _named(columns))[1])


@dataclass(frozen=True)
class HubSplit:
    """One split of a dataset of the hub."""

    dataset: str
    config: str | None
    split: str

    @property
    def name(self) -> str:
        return f"{self.dataset}{f':{self.config}' if self.config else ''}@{self.split}"

    def open(self, task: Task) -> tuple[Columns, Iterator[Mapping[str, Any]]]:
        rows = _hub(lambda datasets: datasets.load_dataset(self.dataset, self.config, split=self.split), self.name)
        columns = _choose(rows.column_names, task, self.name)
        return columns, iter(rows)


@dataclass(frozen=True)
class Parts:
    """What to train on, select on and report on.

    Attributes:
        train: to train on.
        select: to choose the best weights on; None where a share of the training part is held out for that.
        report: what the figures are of.
    """

    train: Part
    select: Part | None
    report: Part


def find_parts(task: Task, data: str) -> Parts:
    """The parts of a task's data.

    Args:
        task: GLUE's hub datasets report on the part that has public labels.
        data: a folder with files named after their part (``train.tsv``, ``sts-dev.csv``, ``test.jsonl``), ``hub``
            for GLUE's own dataset, or the id of another one, ``name[:config]``.

    Raises:
        DataError: nothing is there, a part is missing, or files of several kinds would do for one part.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        found = _in_folder(path)
    elif data == "hub":
        if task.name not in GLUE:
            raise DataError(f"--data hub: holds GLUE's tasks ({', '.join(GLUE)}), not {task.name!r}; give a dataset id")
        found = _on_hub(HUB, task.name, task)
    elif path.exists() or data.startswith((".", "/", "~")) or path.suffix in RECORD_SUFFIXES:
        state = "is a file" if path.exists() else "does not exist"
        raise DataError(f"--data {data!r}: {state}; give the folder that holds train, dev and test files, or 'hub'")
    else:
        match = _HUB_ID.fullmatch(data)
        if match is None:
            raise DataError(f"--data {data!r}: neither a folder nor a dataset id (name or name:config)")
        found = _on_hub(match["name"], match["config"], task)
    return _assign(task, found, data)


def _assign(task: Task, found: Mapping[str, Part], data: str) -> Parts:
    """Which part is for what: without a training part the dev part trains; a test part without labels is no use."""
    train, dev, test = (found.get(name) for name in ("train", "dev", "test"))
    if test is not None and not has_labels(task, test):
        test = None
    if train is None:
        train, dev = dev, None
    report = test or dev
    if train is None or report is None:
        raise DataError(
            f"--data {data!r}: holds {', '.join(found) or 'no part'}; needs one to train on and another one with "
            "labels to report on"
        )
    return Parts(train, dev if report is test else None, report)


def has_labels(task: Task, part: Part) -> bool:
    """Whether the first row of a part has a label; GLUE hides those of its test parts."""
    try:
        columns, rows = part.open(task)
    except DataError:  # test files without a column for labels are what GLUE gives out
        return False
    first = next(rows, None)
    return first is not None and str(first[columns[2]]).strip() not in ("", "-1", "-1.0", "None")


def _in_folder(folder: Path) -> dict[str, Part]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and data_suffix(file) in RECORD_SUFFIXES)
    found: dict[str, Part] = {}
    for part, words in (("train", _TRAIN), ("dev", _DEV), ("test", _TEST)):
        own = [file for file in files if _is_part(file, words)]
        if len({data_suffix(file) for file in own}) > 1:
            raise DataError(f"{folder}: {', '.join(file.name for file in own)} could all be its {part} part; keep one")
        if own:
            found[part] = Files(tuple(own))
    return found


def _is_part(file: Path, words: Sequence[str]) -> bool:
    spelt = re.split(r"[-_. ]", file.name.lower())
    return "mismatched" not in spelt and any(word in spelt for word in words)


def _on_hub(name: str, config: str | None, task: Task) -> dict[str, Part]:
    spelt = name if config is None else f"{name}:{config}"
    splits = _hub(lambda datasets: datasets.get_dataset_split_names(name, config), spelt)
    wanted = {"train": _TRAIN, "dev": (task.report, *_DEV), "test": _TEST}
    found: dict[str, Part] = {}
    for part, words in wanted.items():
        own = next((word for word in words if word in splits), None)
        if own is not None:
            found[part] = HubSplit(name, config, own)
    return found


def _hub(ask: Any, spelt: str) -> Any:
    """What the dataset library answers; its many kinds of errors become one."""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(f"--data {spelt!r}: reading the hub needs datasets; pip install ffsplit[data]") from error
    try:
        return ask(datasets)
    except Exception as error:  # the hub client raises the errors of every library beneath it
        raise DataError(
            f"--data {spelt!r}: no such folder here, and the hub did not give a dataset of that name "
            f"({type(error).__name__}: {str(error).strip()[:300]})"
        ) from error


def _columns_of(path: Path, task: Task) -> Columns:
    for columns in task.columns:
        names, _ = table_rows(path, _named(columns))
        if names is None:
            raise DataError(f"{path}: holds no record")
        if all(name in names for name in _named(columns)):
            return columns
    names, _ = table_rows(path, _named(task.columns[0]))
    return _choose(names or (), task, str(path))


def _choose(names: Sequence[str], task: Task, where: str) -> Columns:
    for columns in task.columns:
        if all(name in names for name in _named(columns)):
            return columns
    wanted = " or ".join(",".join(_named(columns)) for columns in task.columns)
    raise DataError(
        f"{where}: {task.name} needs the columns {wanted}; there are {', '.join(map(repr, names))} "
        "(--columns text_a,text_b,label names others; numbers count the columns of a file without a header)"
    )


def _named(columns: Columns) -> list[str]:
    return [name for name in columns if name is not None]
