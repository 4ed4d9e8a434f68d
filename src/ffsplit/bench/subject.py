"""What is put on the bench: a model, which of its FFNs are compressed, and the sizes of the dense ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from transformers import PreTrainedModel

from ffsplit.calibrate.tokens import max_positions
from ffsplit.checkpoint.quantizer import METHOD, FFSplitStorageConfig, localize
from ffsplit.errors import CannotRunError, CheckpointError, FFSplitError, ModelError
from ffsplit.families.find import find_ffns
from ffsplit.families.site import FFNSite
from ffsplit.families.spelling import spellings
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.pipeline.load import Source, open_source
from ffsplit.pipeline.result import PLAN_FILE

Kind = Literal["dense", "stock", "ffsplit"]


@dataclass(frozen=True)
class Subject:
    """A model before its weights are loaded.

    Attributes:
        source: where to load it from.
        kind: ``dense``; ``stock``: compressed, loads in plain transformers; ``ffsplit``: a checkpoint of sums.
        architecture: the model without weights; of an ``ffsplit`` checkpoint, the dense one that it was made from.
        sites: all its FFNs, in execution order.
        specs: the structure of those that are sums, by the site's name.
        dense: the dense FFNs' sizes, by the site's name; only of compressed models.
        positions: the longest sequence, ``None`` without a limit.
        attentions_left_out: how many attentions the checkpoint lacks.
    """

    source: Source
    kind: Kind
    architecture: PreTrainedModel
    sites: tuple[FFNSite, ...]
    specs: Mapping[str, SumSpec]
    dense: Mapping[str, FFNShape]
    positions: int | None
    attentions_left_out: int = 0

    @property
    def reads_text(self) -> bool:
        """Whether token ids are its input."""
        return str(self.architecture.main_input_name) == "input_ids"


def open_subject(name: str) -> Subject:
    """Look at a model without loading a weight.

    Raises:
        ModelError: there is no model, or it has no FFN.
        CheckpointError: its plan or configuration is damaged.
    """
    source = open_source(name)
    plain = _without_format(source)
    architecture = plain.skeleton()
    stored = _stored(source)
    entries = [] if stored is None else [(localize(architecture, site), spec) for site, spec in stored.entries()]
    plan = _plan(Path(name).expanduser() / PLAN_FILE)
    sites = _sites(plain, architecture, entries)
    specs = {site.name: spec for site, spec in entries}
    kind: Kind = "ffsplit" if stored is not None else "dense" if plan is None else "stock"
    told = {spelt: shape for name, shape in (plan or {}).items() for spelt in spellings(architecture, name)}
    dense = {} if kind == "dense" else {s.name: told.get(s.name) or _shape_of(s, specs.get(s.name)) for s in sites}
    gone = 0 if stored is None else len(stored.left_out())
    return Subject(source, kind, architecture, sites, specs, dense, max_positions(architecture), gone)


def check_same_shapes(subject: Subject, against: Subject) -> None:
    """A model is the dense one that another was made from, as far as shapes tell.

    Raises:
        ModelError: it is compressed itself, or its FFNs or vocabulary have other sizes.
    """
    name = against.source.name
    if subject.kind == "dense":
        raise ModelError(f"{subject.source.name}: is dense itself, so there is nothing to hold --against it")
    if against.kind != "dense":
        raise ModelError(f"--against {name}: is itself compressed by ffsplit; give the dense model")
    here, there = len(subject.sites), len(against.sites)
    if here != there:
        raise ModelError(f"--against {name}: has {there} FFNs, {subject.source.name} has {here}")
    for ours, other in zip(subject.sites, against.sites, strict=True):
        wanted, found = _sizes(ours, subject.dense.get(ours.name)), _sizes(other, None)
        if wanted != found:
            raise ModelError(
                f"--against {name}: {other.name} has {_words(found)}, "
                f"{subject.source.name} was made from one with {_words(wanted)}"
            )
    sizes = [getattr(s.architecture.config.get_text_config(), "vocab_size", None) for s in (subject, against)]
    if sizes[0] != sizes[1]:
        raise ModelError(f"--against {name}: has a vocabulary of {sizes[1]}, {subject.source.name} of {sizes[0]}")


def _sizes(site: FFNSite, dense: FFNShape | None) -> tuple[int, int, bool]:
    return (site.d_model, site.d_ff, site.gated) if dense is None else (dense.d_model, dense.d_ff, dense.gated)


def _words(sizes: tuple[int, int, bool]) -> str:
    return f"d_model {sizes[0]}, d_ff {sizes[1]}, {'gated' if sizes[2] else 'not gated'}"


def _stored(source: Source) -> FFSplitStorageConfig | None:
    """What a checkpoint in ffsplit's format says it holds."""
    stored = getattr(source.config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") == METHOD:
        return FFSplitStorageConfig(**stored)
    return stored if isinstance(stored, FFSplitStorageConfig) else None


def _without_format(source: Source) -> Source:
    """The same architecture as a plain model."""
    config = copy.deepcopy(source.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return replace(source, config=config)


def _sites(plain: Source, skeleton: PreTrainedModel, entries: list[tuple[FFNSite, SumSpec]]) -> tuple[FFNSite, ...]:
    """The FFNs of the plain architecture; of a model that no made-up input runs, those that a checkpoint names."""
    try:
        return find_ffns(skeleton).sites
    except CannotRunError:
        if entries:
            return tuple(site for site, _ in entries)
        return find_ffns(plain.load()).sites


def _shape_of(site: FFNSite, spec: SumSpec | None) -> FFNShape:
    """The dense size where no plan tells it: what the checkpoint says of the site, with the biases that are left."""
    branches = () if spec is None else spec.branches
    return FFNShape(
        d_model=site.d_model,
        d_ff=site.d_ff,
        gated=site.gated,
        up_bias=any(branch.up_bias for branch in branches),
        gate_bias=any(branch.gate_bias for branch in branches),
        down_bias=spec is not None and spec.bias,
    )


def _plan(file: Path) -> dict[str, FFNShape] | None:
    """The dense shapes of a plan, by the site's name."""
    if not file.is_file():
        return None
    try:
        ffns = json.loads(file.read_text(encoding="utf-8"))["ffns"]
        return dict(_planned(ffns))
    except (ValueError, KeyError, TypeError, ValidationError, FFSplitError) as error:
        raise CheckpointError(f"{file}: damaged, or written by another version: {error}") from error


def _planned(ffns: list[dict[str, Any]]) -> Iterator[tuple[str, FFNShape]]:
    for ffn in ffns:
        yield ffn["site"]["name"], FFNShape(**ffn["shape"])
