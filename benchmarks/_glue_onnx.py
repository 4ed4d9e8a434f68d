"""Timing the variants of an encoder in ONNX Runtime, exported as ``ffsplit export --to onnx`` does."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from _glue_torch import WARMUP, Timed
from _glue_variants import Variant
from ffsplit.errors import FFSplitError
from ffsplit.export.check import EXACT, session
from ffsplit.export.inputs import signature
from ffsplit.export.run import compared, write_graph
from ffsplit.export.trace import GRAPH
from ffsplit.families.surgery import restore
from ffsplit.timing import Clock, medians

Ready = Any | str
"""A session, or why there is none."""


def sessions(
    model: PreTrainedModel, variants: Sequence[Variant], folder: Path, label: str, threads: int
) -> list[Ready]:
    """A session for every variant; a graph that does not compute what torch computes is not among them.

    Args:
        model: with the dense FFNs in place, as it is again afterwards.
        variants: to export.
        folder: graphs that are there already are not written again.
        label: begins the names of the graphs' folders.
        threads: of every session.
    """
    ready: list[Ready] = []
    for variant in variants:
        target = folder / f"{label} {variant.name}"
        restore(model, variant.modules)
        try:
            if not target.exists():
                export(copy.deepcopy(model), target)
            ready.append(session(target / GRAPH, threads))
        except FFSplitError as error:
            ready.append(f"{type(error).__name__}: {error}")
    restore(model, variants[0].modules)
    return ready


def export(model: PreTrainedModel, target: Path) -> None:
    """Write the graph of a model and prove it; the folder appears whole or not at all, the model no longer runs.

    Raises:
        FFSplitError: it cannot be exported, or ONNX Runtime computes something else.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        whole = Path(work) / "whole"
        whole.mkdir()
        answers = write_graph(model, signature(type(model), model.config), whole)
        compared(whole / GRAPH, answers, allowed=EXACT, round_inputs=False)
        os.replace(whole, target)


def times(ready: Sequence[Ready], ids: Tensor, rounds: int, clock: Clock) -> list[Timed]:
    """The medians of all variants, which take turns."""
    runs = [partial(_seconds, clock, _forward(one, ids)) for one in ready if not isinstance(one, str)]
    found = iter(medians(runs, rounds, WARMUP))
    return [Timed(None, failed=one) if isinstance(one, str) else Timed(next(found)) for one in ready]


def _forward(running: Any, ids: Tensor) -> Callable[[], object]:
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    feed: dict[str, np.ndarray[Any, Any]] = {i.name: values[i.name].numpy() for i in running.get_inputs()}
    return partial(running.run, None, feed)


def _seconds(clock: Clock, work: Callable[[], object]) -> float:
    started = clock()
    work()
    return clock() - started
