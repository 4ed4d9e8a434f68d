"""From a model to an ONNX graph, by the exporter of transformers (which uses torch's)."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ffsplit.errors import ModelError
from ffsplit.export.inputs import Signature
from ffsplit.export.sums import exportable
from ffsplit.families.surgery import restore
from ffsplit.ffn.sum import SumFFN

GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
_PAST, _NEW = 5, 3
"""Lengths to trace with; none is 0 or 1, which a tracer would take for constants."""


def write_nodes(model: nn.Module) -> None:
    """Put what the tracer turns into nodes into the place of every compressed FFN. The model no longer runs.

    Raises:
        ModelError: a storage has no ONNX form.
    """
    sums = {path: module for path, module in model.named_modules() if isinstance(module, SumFFN)}
    restore(model, {path: exportable(ffn) for path, ffn in sums.items()})


@torch.no_grad()
def sample(model: PreTrainedModel, signature: Signature) -> dict[str, Any]:
    """Inputs to trace with. Call it while the model still runs."""
    if signature.kind == "encoder":
        mask = torch.ones(2, _PAST, dtype=torch.long)
        mask[1, _NEW:] = 0
        return signature.batch(mask, _PAST, seed=0)
    filled = torch.ones(2, _PAST + _NEW, dtype=torch.long)
    before = model(**signature.batch(filled[:, :_PAST], _PAST, seed=0), use_cache=True)
    return signature.batch(filled, _NEW, seed=1, cache=before.past_key_values)


def trace(model: PreTrainedModel, inputs: dict[str, Any], folder: Path) -> None:
    """Write ``model.onnx`` and its weights beside it, all sizes but those of the model itself left open.

    Raises:
        ModelError: the exporter cannot trace the model; the message is its own.
    """
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    with _silent():
        try:
            exported: Any = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True))
        except Exception as error:  # tracing runs the model's own code, which raises whatever it likes
            raise ModelError(f"{type(model).__name__} cannot be traced for ONNX: {str(error).strip()[:500]}") from error
    if hasattr(exported, "save_pretrained"):
        exported.save_pretrained(folder)
    else:  # transformers 5.16 returns torch's program
        exported.save(folder / GRAPH, external_data=True)


def trace_module(module: nn.Module, inputs: torch.Tensor, path: Path) -> None:
    """Write one module of a tensor ``[batch, tokens, width]`` as a graph of its own, batch and tokens left open."""
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with _silent():
        program = torch.onnx.export(module.eval(), (inputs,), dynamo=True, dynamic_shapes=(free,), verbose=False)
    assert program is not None
    program.save(path, external_data=True)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the exporter's progress, its advice on versions, and the warnings that it causes in torch itself."""
    before = logging.root.manager.disable
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
