"""GLUE's metrics on predicted and true labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from ffsplit.errors import DataError
from ffsplit.evaluate.embeddings import pearson, spearman
from ffsplit.tasks.task import Metric, Task


def accuracy(predicted: ArrayLike, true: ArrayLike) -> float:
    """Share of equal labels, in [0, 1]."""
    return float(np.mean(np.asarray(predicted) == np.asarray(true)))


def f1(predicted: ArrayLike, true: ArrayLike) -> float:
    """Harmonic mean of precision and recall of label 1, in [0, 1]; 0 when it is neither predicted nor true."""
    mine, gold = np.asarray(predicted) == 1, np.asarray(true) == 1
    found = int((mine & gold).sum())
    total = int(mine.sum()) + int(gold.sum())
    return 2 * found / total if total else 0.0


def matthews(predicted: ArrayLike, true: ArrayLike) -> float:
    """Correlation of labels in [-1, 1], of any number of classes; 0 where one side is constant.

    Reference: Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation coefficient", eq. 8.
    """
    mine, gold = np.asarray(predicted), np.asarray(true)
    classes = np.union1d(mine, gold)
    first = (mine[:, None] == classes).astype(np.float64)
    second = (gold[:, None] == classes).astype(np.float64)
    first -= first.mean(0)
    second -= second.mean(0)
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / scale) if scale > 0 else 0.0


METRICS: dict[Metric, Callable[[ArrayLike, ArrayLike], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def measure(task: Task, outputs: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """The task's metrics, times 100.

    Args:
        task: says which.
        outputs: of the model's head, ``[examples, classes]``, or ``[examples, 1]`` of a regression.
        true: labels as numbers ``[examples]``.

    Raises:
        DataError: an output is not finite, or all predictions of a regression are equal.
    """
    if not np.isfinite(outputs).all():
        raise DataError(f"{task.name}: the model's outputs are not finite")
    predicted = outputs[:, 0] if task.regression else outputs.argmax(-1)
    return {name: 100 * METRICS[name](predicted, true) for name in task.metrics}
