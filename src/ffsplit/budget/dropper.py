"""Trying out what the model answers when some FFNs or attentions are dropped; everything is put back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager

import torch

from ffsplit.budget.ledger import Ledger
from ffsplit.budget.scene import Scene
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.families import AttentionSite, drop_attention, replace
from ffsplit.families.blocks import Block
from ffsplit.families.surgery import restore
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.drop import DropConfig
from ffsplit.methods.registry import get_method

Score = Callable[[BlockReplay, Block], float]
"""How bad the model as it is now is, given a replay that has finished all blocks before the given one."""


class Dropper:
    """Measures sets of dropped sub-layers, FFNs with their replacements in place, and measures none twice.

    Args:
        scene: the dense model.
        drop: what takes the place of a dropped FFN; fitted once, on the dense model's inputs.
        candidates: what may be dropped, by its place in ``scene.sub_layers``.
        score: what is measured.
        name: of the score; with `drop` and ``batches`` it says which measurements of an earlier run are the same.
        batches: that the score looks at.
    """

    def __init__(
        self, scene: Scene, drop: DropConfig, candidates: Sequence[int], score: Score, name: str, batches: int
    ) -> None:
        digest = hashlib.sha256(drop.model_dump_json().encode()).hexdigest()[:16]
        self._file = None if scene.store is None else scene.store / f"dropped-{name}-{batches}-{digest}.json"
        self._ledger = Ledger(self._file)
        self._scene, self._drop, self._score, self._batches = scene, drop, score, batches
        self._candidates = candidates
        self._fitted: dict[int, SumFFN] | None = None

    def one_more(self, dropped: Collection[int]) -> dict[int, float]:
        """The score for each candidate that is not dropped yet, if it went too. Starts each run at its block."""
        left = [index for index in self._candidates if index not in dropped]
        missing = {index for index in left if self._ledger.get(_key([*dropped, index])) is None}
        if missing:
            with self._standing_in(dropped), closing(self._walk()) as walk:
                for block, replay in walk:
                    self._measure_block(block, replay, dropped, missing)
                    if not missing:
                        break
        return {index: self._known([*dropped, index]) for index in left}

    def score(self, dropped: Collection[int]) -> float:
        """The score with a set of candidates dropped."""
        if self._ledger.get(_key(dropped)) is None:
            with self._standing_in(dropped), closing(self._walk()) as walk:
                block, replay = next(walk)
                self._ledger.put(_key(dropped), self._score(replay, block))
        return self._known(dropped)

    def _walk(self) -> Generator[tuple[Block, BlockReplay]]:
        return self._scene.walk(self._batches, "dropped", to_the_end=True)

    def _known(self, dropped: Collection[int]) -> float:
        value = self._ledger.get(_key(dropped))
        assert value is not None
        return value

    def _measure_block(self, block: Block, replay: BlockReplay, dropped: Collection[int], missing: set[int]) -> None:
        for index, _ in self._scene.inside(block):
            if index in missing:
                with self._standing_in([index]):
                    self._ledger.put(_key([*dropped, index]), self._score(replay, block))
                missing.discard(index)

    @contextmanager
    def _standing_in(self, dropped: Collection[int]) -> Iterator[None]:
        """The model with replacements in the place of some FFNs, and without some attentions."""
        if self._fitted is None:
            self._fitted = self._fit()
        model = self._scene.model
        taken = []
        try:
            for index in dropped:
                site = self._scene.sub_layers[index]
                if isinstance(site, AttentionSite):
                    taken.append(drop_attention(model, site))
                    continue
                down = next(model.get_submodule(site.down).parameters())
                module = self._fitted[index].to(device=self._scene.device, dtype=down.dtype)
                taken.append(replace(model, site, module))
            yield
        finally:
            for originals in reversed(taken):
                restore(model, originals)

    @torch.no_grad()
    def _fit(self) -> dict[int, SumFFN]:
        ffns = [index for index in self._candidates if index < len(self._scene.shapes)]
        if not self._drop.needs_data or not ffns:
            return {index: SumFFN(self._scene.shapes[index].d_model) for index in ffns}
        fitted: dict[int, SumFFN] = {}
        for index, data in self._scene.layers(label="replacements"):
            if index in ffns:
                fitted[index] = get_method("drop").apply(data, self._drop).requires_grad_(False)
        return fitted


def _key(dropped: Collection[int]) -> str:
    return ",".join(map(str, sorted(dropped)))
