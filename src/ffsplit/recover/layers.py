"""Going through the FFNs one by one, each beside its dense original, on the inputs that a prefix gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from ffsplit.calibrate.batches import with_decoder
from ffsplit.calibrate.cache import TensorCache
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.errors import ModelError, RecipeError
from ffsplit.families import FFNSite, find_ffns, read
from ffsplit.families.blocks import Block
from ffsplit.families.forward import evaluating, without_cache
from ffsplit.ffn.sum import SumFFN
from ffsplit.ffn.weights import FFNWeights
from ffsplit.kernels.dispatch import exact_products
from ffsplit.recover.config import Recovery
from ffsplit.recover.store import Store
from ffsplit.recover.text import Text

Progress = Callable[[str, int, int], None]
MOST_TOKENS = 1 << 18
"""Tokens of text whose inputs are recorded: one layer takes far fewer to learn than a model."""


@dataclass(frozen=True)
class Layer:
    """One compressed FFN and what it is to imitate.

    Attributes:
        index: in the order of execution.
        name: of the site.
        module: the compressed FFN.
        dense: the original's weights, on the same device.
        inputs: rows to train on.
        held_out: rows to judge by.
    """

    index: int
    name: str
    module: SumFFN
    dense: FFNWeights
    inputs: Float[Tensor, "tokens d_model"]
    held_out: Float[Tensor, "held d_model"]

    @torch.no_grad()
    def error(self, piece: int = 1 << 13) -> float:
        """``||FFN(x) - sum(x)||^2 / ||FFN(x)||^2`` on the held-out rows."""
        difference = total = 0.0
        for rows in torch.split(self.held_out, piece):  # type: ignore[no-untyped-call]
            wanted = self.wanted(rows)
            difference += float((wanted - self.module(rows.to(self.dtype)).float()).double().square().sum())
            total += float(wanted.double().square().sum())
        return difference / total if total else 0.0

    @property
    def dtype(self) -> torch.dtype:
        """Of the compressed FFN's numbers, float32 if it has none."""
        return next((p.dtype for p in self.module.parameters() if p.numel()), torch.float32)

    @torch.no_grad()
    def wanted(self, rows: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        """The original's outputs, float32."""
        return self.dense(rows.to(self.dense.up.dtype)).float()


Work = Callable[[Layer], dict[str, Any] | None]


@dataclass(frozen=True)
class Tour:
    """A way through all layers.

    Attributes:
        student: whose FFNs are changed in place.
        teacher: the dense model, on the same device.
        text: the windows whose inputs are recorded.
        config: which prefix records them.
        store: of finished FFNs; None keeps none.
        stage: name of the stage, for the store and the progress.
        work: changes ``layer.module`` and says what it did; None when there was nothing to do.
        progress: called with (what, done, total).
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    text: Text
    config: Recovery
    store: Store | None
    stage: str
    work: Work
    progress: Progress | None

    def run(self) -> list[dict[str, Any]]:
        """Do the work on every compressed FFN; a finished one is taken from the store. Gives the notes of all.

        Raises:
            ModelError: the teacher's FFNs are not at the student's places.
        """
        found = find_ffns(self.teacher)
        index_of = {site.name: index for index, site in enumerate(found.sites)}
        notes: list[dict[str, Any]] = []
        recorder = self.student if self.config.prefix == "compressed" else self.teacher
        with evaluating(self.student, self.teacher), without_cache(recorder), exact_products(), TensorCache() as cache:
            device = next(self.student.parameters()).device
            replay = BlockReplay(recorder, _batches(self.student, self.text), cache, device)
            for number, block in enumerate(found.blocks):
                notes += self._block(replay, block, index_of)
                replay.advance(block)
                if self.progress is not None:
                    self.progress(self.stage, number + 1, len(found.blocks))
        return notes

    def _block(self, replay: BlockReplay, block: Block, index_of: dict[str, int]) -> list[dict[str, Any]]:
        sites = _compressed_sites(self.student, block)
        left = [site for site in sites if self.store is None or not self.store.holds(self._key(index_of[site.name]))]
        inputs = {}
        if left:
            # A replaced FFN has no projections of its own any more: what comes in is seen at the sum. Inputs of a block
            # are recorded before any of its FFNs changes, finished ones of an earlier run included.
            inside = replay.model is self.student
            here = [replace(site, up=site.name) if inside else site for site in left]
            inputs = replay.capture(replace(block, sites=tuple(here)))
        notes: list[dict[str, Any] | None] = []
        for site in sites:
            if site not in left:
                assert self.store is not None
                notes.append(self.store.finished(self._key(index_of[site.name]), _sum_at(self.student, site)))
                continue
            rows = torch.cat(list(inputs[site.name])).to(replay.device)
            inputs[site.name].drop()
            notes.append(self._layer(site, index_of[site.name], rows))
        return [note for note in notes if note]

    def _layer(self, site: FFNSite, index: int, rows: Tensor) -> dict[str, Any] | None:
        held = max(1, round(len(rows) * self.text.held_out / self.text.windows.samples))
        module = _sum_at(self.student, site)
        layer = Layer(index, site.name, module, read(self.teacher, site), rows[:-held], rows[-held:])
        made = self.work(layer)
        if self.store is not None:
            self.store.finish(self._key(index), module, made or {})
        return made

    def _key(self, index: int) -> str:
        return f"{self.stage}-{index:04d}"


def summary(stage: str, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The notes of a stage from those of its layers.

    Raises:
        RecipeError: there was nothing to do in any of them.
    """
    if not layers:
        raise RecipeError(f"stage {stage}: the compressed FFNs hold nothing that it could change")
    return {
        "stage": stage,
        "held_out_loss_before": sum(layer["held_out_loss_before"] for layer in layers) / len(layers),
        "held_out_loss": sum(layer["held_out_loss"] for layer in layers) / len(layers),
        "steps": sum(layer["steps"] for layer in layers),
        "seconds": round(sum(layer["seconds"] for layer in layers), 1),
        "layers": layers,
    }


def _sum_at(model: PreTrainedModel, site: FFNSite) -> SumFFN:
    module = model.get_submodule(site.name)
    assert isinstance(module, SumFFN)
    return module


def _compressed_sites(student: PreTrainedModel, block: Block) -> list[FFNSite]:
    """The sites of a block whose FFN is a sum in the student.

    Raises:
        ModelError: the student has no such place.
    """
    places = []
    for site in block.sites:
        try:
            module = student.get_submodule(site.name)
        except AttributeError as error:
            raise ModelError(
                f"the compressed model has no {site.name}: it was made from another dense model"
            ) from error
        if isinstance(module, SumFFN):
            places.append(site)
    return places


def _batches(model: PreTrainedModel, text: Text) -> list[dict[str, Tensor]]:
    """Windows to record on, the held-out ones last."""
    most = max(2, MOST_TOKENS // text.windows.seq_len)
    trained = min(text.trained_on, max(1, most - text.held_out))
    rows = torch.cat([torch.arange(trained), torch.arange(text.trained_on, text.windows.samples)])
    chosen = torch.split(rows, text.batch_size)  # type: ignore[no-untyped-call]
    return [with_decoder(model, text.plain(part)) for part in chosen]
