"""Exporting a checkpoint: refused before any work or written whole, after ONNX Runtime has computed what torch does."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ffsplit.checkpoint.quantizer import FFSplitStorageConfig
from ffsplit.checkpoint.save import publish, refuse_existing, staged
from ffsplit.errors import ModelError, RecipeError
from ffsplit.export.check import EXACT, LOOSE, ROUNDED, Case, cases, compare, float_inputs, rounds_blocks
from ffsplit.export.inputs import Kind, Signature, signature
from ffsplit.export.storages import notes, refuse_inexpressible
from ffsplit.export.trace import GRAPH, sample, trace, write_nodes
from ffsplit.ffn.spec import SumSpec
from ffsplit.pipeline.load import Source, open_source
from ffsplit.provenance import versions

REPORT_FILE = "ffsplit_export.json"
PACKAGES = ("onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        directory: with ``model.onnx``, its weights, the configuration and the tokenizer.
        kind: ``encoder``, or ``decoder`` with a key-value cache.
        difference: largest relative difference to torch of any output, inputs of packed matrices left in float32.
        rounded_difference: the same of the graph as it is written, which rounds them to int8; None where it does not.
        notes: what became larger or does not get faster.
        bytes: on disk, all files.
    """

    directory: Path
    kind: Kind
    difference: float
    rounded_difference: float | None
    notes: tuple[str, ...]
    bytes: int


def export_onnx(model: str | Path, directory: str | Path, *, round_inputs: bool = True) -> Exported:
    """Write a checkpoint as an ONNX graph for ONNX Runtime.

    Packed codes stay the codes that they are (``MatMulNBits``), int8 weights with inputs rounded per token stay int8
    (``MatMulIntegerToFloat``), everything else becomes float32.

    Args:
        model: a directory of :func:`ffsplit.save`, or any checkpoint of a text encoder or decoder.
        directory: to write; must not exist yet, or be empty.
        round_inputs: let ONNX Runtime round the inputs of packed matrices to int8 in blocks, for which it has fast
            kernels; without, the graph computes what torch computes up to float32 rounding, more slowly.

    Raises:
        RecipeError: the packages of the extra ``onnx`` are missing.
        ModelError: no model is there, it is of a kind that cannot be exported, a storage has no ONNX form, or the
            exporter cannot trace it.
        CheckpointError: the directory exists, or ONNX Runtime does not compute what torch computes. Nothing is left.
    """
    _require_packages()
    target = Path(directory).resolve()
    refuse_existing(target, overwrite=False)
    source = open_source(str(model))
    asked = signature(source.model_class, source.config)
    specs = _specs(source)
    refuse_inexpressible(specs)
    told = notes(spec for _, spec in specs)
    loaded = source.load(torch.float32)
    with staged(target) as folder:
        answers = write_graph(loaded, asked, folder)
        allowed = LOOSE if _loose(specs) else EXACT
        difference, rounded = compared(folder / GRAPH, answers, allowed=allowed, round_inputs=round_inputs)
        _beside(source, loaded, folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        done = Exported(Path(directory), asked.kind, difference, rounded, tuple(told), size)
        record = {**asdict(done), "directory": target.name, "versions": {**versions(), **_package_versions()}}
        (folder / REPORT_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        publish(folder, target)
    return done


def write_graph(model: PreTrainedModel, asked: Signature, folder: Path) -> list[Case]:
    """Trace the model into the folder, after it has answered; it no longer runs afterwards."""
    model.eval().requires_grad_(False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    answers, inputs = cases(model, asked), sample(model, asked)
    write_nodes(model)
    trace(model, inputs, folder)
    return answers


def compared(graph: Path, answers: Sequence[Case], *, allowed: float, round_inputs: bool) -> tuple[float, float | None]:
    """Prove a graph with its inputs in float32, and leave it with them rounded or, if wanted, as it was proved.

    Returns:
        the differences, see :class:`Exported`.

    Raises:
        CheckpointError: one is too large.
    """
    if not rounds_blocks(graph):
        return compare(graph, answers, allowed), None
    plain = float_inputs(graph)
    difference = compare(plain, answers, allowed)
    if not round_inputs:
        os.replace(plain, graph)
        return difference, None
    plain.unlink()
    return difference, compare(graph, answers, ROUNDED)


def _beside(source: Source, model: PreTrainedModel, folder: Path) -> None:
    """What is needed to use the graph: configuration and tokenizer."""
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer = source.tokenizer()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _specs(source: Source) -> list[tuple[str, SumSpec]]:
    """Names and structures of the compressed FFNs, from the configuration; none for a plain checkpoint."""
    stored: Any = getattr(source.config, "quantization_config", None)
    if isinstance(stored, dict):
        if stored.get("quant_method") != "ffsplit":
            raise ModelError(
                f"{source.name} is quantised by {stored.get('quant_method')!r}, which is not ours to export"
            )
        stored = FFSplitStorageConfig.from_dict(stored)
    if stored is None:
        return []
    return [(site.name, spec) for site, spec in stored.entries()]


def _loose(specs: list[tuple[str, SumSpec]]) -> bool:
    """Whether some step is not continuous, so that a last digit may decide: codes of inputs, thresholds, gates."""
    return any(
        spec.rounds_inputs or spec.skip is not None or any(b.selector is not None for b in spec.branches)
        for _, spec in specs
    )


def _require_packages() -> None:
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise RecipeError(f"export to ONNX needs {', '.join(missing)}: pip install 'ffsplit[onnx]'")


def _package_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in PACKAGES}
