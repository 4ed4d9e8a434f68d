"""What a checkpoint says about itself, before any weight is loaded."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ffsplit.checkpoint.card import shown_name
from ffsplit.checkpoint.quantizer import METHOD
from ffsplit.errors import CheckpointError
from ffsplit.evaluate.size import size_of
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.pipeline.load import Source, open_source
from ffsplit.pipeline.result import PLAN_FILE, REPORT_FILE

Kind = Literal["dense", "stock", "ffsplit"]
DENSE_BITS = 16.0


@dataclass(frozen=True)
class LayerFacts:
    """What became of one FFN.

    Attributes:
        ffn: its place in the model.
        method: the method's name, ``None`` if it was left alone.
        terms: its branches in words, heavy first.
        keep: share of its parameters that stay.
        bits: stored bits per dense weight, floats as 16.
        output_error: relative error of its output on the calibration text, if it was measured.
    """

    ffn: str
    method: str | None
    terms: tuple[str, ...]
    keep: float
    bits: float
    output_error: float | None


@dataclass(frozen=True)
class CheckpointFacts:
    """One checkpoint of a comparison.

    Attributes:
        name: short and unique in the comparison.
        source: where to load it from.
        kind: ``dense``; ``stock``: compressed, loads in plain transformers; ``ffsplit``: needs ``import ffsplit``.
        layers: its FFNs, if it was compressed by ffsplit.
        report: what `ffsplit_report.json` holds.
        bytes_disk: of its weight files; ``None`` for a model that is not a local file or folder.
    """

    name: str
    source: Source
    kind: Kind
    layers: tuple[LayerFacts, ...] = ()
    report: dict[str, Any] = field(default_factory=dict)
    bytes_disk: int | None = None

    @property
    def methods(self) -> str | None:
        """The names of the methods that were used, or ``None`` for a dense model."""
        return ", ".join(dict.fromkeys(layer.method for layer in self.layers if layer.method)) or None

    @property
    def budget(self) -> dict[str, float | None]:
        """``keep_ffn``, ``keep_model`` and ``bits_ffn``; ``None`` where the checkpoint does not say."""
        if self.kind == "dense":
            return {"keep_ffn": 1.0, "keep_model": 1.0, "bits_ffn": DENSE_BITS}
        said = self.report.get("budget") or {}
        return {name: said.get(name) for name in ("keep_ffn", "keep_model", "bits_ffn")}


def read_facts(places: Sequence[str]) -> list[CheckpointFacts]:
    """Facts of several checkpoints, with names that tell them apart.

    Raises:
        ModelError: there is no model at one of the places.
        CheckpointError: a plan or report is damaged.
    """
    return [_facts(place, name) for place, name in zip(places, short_names(places), strict=True)]


def short_names(places: Sequence[str]) -> list[str]:
    """The last part of each place (a hub id whole), or as much of the place as tells them apart; else a number too."""
    names = [shown_name(place) for place in places]
    for depth in range(2, max((len(Path(place).parts) for place in places), default=0) + 1):
        counts = Counter(names)
        for index, place in enumerate(places):
            if counts[names[index]] > 1:
                names[index] = str(Path(*Path(place).parts[-depth:]))
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({number})" for number, name in enumerate(names, start=1)]


def _facts(place: str, name: str) -> CheckpointFacts:
    source = open_source(place)
    folder = Path(place).expanduser()
    plan, report = _json(folder / PLAN_FILE), _json(folder / REPORT_FILE)
    stored = getattr(source.config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    kind: Kind = "ffsplit" if method == METHOD else "dense" if plan is None else "stock"
    layers = () if plan is None else _layers(plan, report or {}, folder / PLAN_FILE)
    return CheckpointFacts(name, source, kind, layers, report or {}, _disk(folder))


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, expected an object")
    return content


def _layers(plan: dict[str, Any], report: dict[str, Any], file: Path) -> tuple[LayerFacts, ...]:
    errors = {layer.get("ffn"): layer.get("output_error") for layer in report.get("layers") or ()}
    try:
        return tuple(_layer(ffn, errors.get(ffn["site"]["name"])) for ffn in plan["ffns"])
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{file}: damaged, or written by another version: {error}") from error


def _layer(ffn: dict[str, Any], error: float | None) -> LayerFacts:
    spec, shape = SumSpec.model_validate(ffn["spec"]), FFNShape(**ffn["shape"])
    return LayerFacts(
        ffn=ffn["site"]["name"],
        method=ffn["method"]["method"] if ffn["method"] else None,
        terms=spec.terms() or (spec.describe(),),
        keep=spec.parameters / shape.parameters,
        bits=spec.stored_bits() / shape.weights,
        output_error=error if error is not None and math.isfinite(error) else None,
    )


def _disk(place: Path) -> int | None:
    if place.is_file():
        return place.stat().st_size
    has_weights = place.is_dir() and next(place.glob("*.safetensors"), None) is not None
    return size_of(place).weight_bytes_on_disk if has_weights else None
