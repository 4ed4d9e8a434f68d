"""Compressed tiny models and their outputs, for the tests of checkpoints."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import ffsplit
from ffsplit.families.inputs import candidate_inputs
from tests.tiny import VOCABULARY, tiny
from tests.unit.fitted import fitted

PRUNE: dict[str, Any] = {"method": "prune", "keep": 0.5, "align": 8}
SPLIT: dict[str, Any] = {"method": "ffsplit", "bits": 7.5, "group": 16, "heavy": 0.25, "heavy_bits": 16, "rest_bits": 3}
UNEVEN: dict[str, Any] = {"method": PRUNE, "overrides": [{"ffns": "0", "method": {**PRUNE, "keep": 0.75}}]}
PARTLY: dict[str, Any] = {"method": SPLIT, "overrides": [{"ffns": "0", "method": None}]}


def ids(rows: int = 4, columns: int = 16) -> Tensor:
    return torch.randint(5, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(1))


def compressed(
    model: str | PreTrainedModel, method: dict[str, Any] = SPLIT, tokenizer: Any | None = None
) -> ffsplit.CompressionResult:
    """A method, or a whole recipe, applied to a tiny model."""
    recipe = method if isinstance(method["method"], dict) else {"method": method}
    if isinstance(model, str) and tokenizer is None:
        return fitted(tiny(model), recipe, ids())
    dense = tiny(model) if isinstance(model, str) else model
    return ffsplit.compress(dense, tokenizer, recipe=recipe, calibration=ids(), device="cpu")


@functools.cache
def stored_llama(folder: Path) -> tuple[Path, Tensor]:
    """A tiny Llama in ffsplit's format, and its logits. ``folder`` is a session's; nothing in it may be changed."""
    result = compressed("llama")
    expected = outputs(result.model)
    ffsplit.save(result, folder / "llama")
    return folder / "llama", expected


@torch.no_grad()
def outputs(model: PreTrainedModel) -> Tensor:
    """The first floating-point output on the same made-up inputs every time."""
    output = model.eval()(**next(iter(candidate_inputs(model))), return_dict=True)
    first = next(value for value in output.values() if isinstance(value, Tensor) and value.is_floating_point())
    return first.clone()


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Tamper with the ``quantization_config`` of a checkpoint."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to see that nothing changed."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
