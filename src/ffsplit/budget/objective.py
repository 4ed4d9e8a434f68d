"""How far a changed model's final answers are from the dense model's, on calibration text: what decisions minimise."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils import _pytree as pytree

from ffsplit.budget.scene import Scene
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.errors import ModelError, RecipeError
from ffsplit.families.blocks import Block
from ffsplit.ops.divergence import angular_distance, js_divergence, kl_divergence, relative_distance

Metric = Literal["kl", "js", "angular", "norm"]
METRICS: tuple[str, ...] = get_args(Metric)
POSITIONS = 256
"""Positions of a batch at which answers are compared: the logits of a whole window would not fit in memory."""


class Objective:
    """The dense model's answers at some positions of some batches, and the distance of other answers from them.

    An answer is a row of logits, or of the last hidden states where the model has no logits; of these, ``kl`` and
    ``js`` mean the relative squared distance (``norm``).

    Attributes:
        batches: how many batches are compared.
    """

    def __init__(self, scene: Scene, batches: int) -> None:
        self._scene = scene
        self.batches = min(batches, len(scene.data.batches))
        can_keep = "logits_to_keep" in inspect.signature(scene.model.forward).parameters
        self._places = [_Places.of(scene, batch, can_keep) for batch in scene.batches(self.batches)]
        self._reference: list[Tensor] = []
        self._distributions = False

    @classmethod
    def of(cls, scene: Scene, batches: int) -> Objective:
        """The answers of the scene's model as it is now, which runs once.

        Raises:
            ModelError: they are NaN.
        """
        objective = cls(scene, batches)
        walk = scene.walk(objective.batches, "dense answers", to_the_end=True)
        block, replay = next(walk)
        for index, output in replay.finish(block, objective.options):
            objective._distributions = isinstance(getattr(output, "logits", None), Tensor)
            objective._reference.append(objective._answers(output, index))
            if bool(objective._reference[-1].isnan().any()):
                raise ModelError(f"{type(scene.model).__name__}: the dense model's own answers are NaN on this text")
        walk.close()
        return objective

    def options(self, index: int) -> Mapping[str, object]:
        """Further arguments of the model's forward for a batch: only the logits that are compared."""
        kept = self._places[index].kept
        return {} if kept is None else {"logits_to_keep": kept}

    def damage(self, output: object, index: int, metric: Metric = "kl") -> float:
        """Mean distance of a model's answers to a batch from the dense model's; infinite where they are NaN."""
        wanted, found = self._reference[index], self._answers(output, index)
        if metric in ("kl", "js") and not self._distributions:
            metric = "norm"
        distance = {"kl": kl_divergence, "js": js_divergence, "angular": angular_distance, "norm": relative_distance}
        if metric not in distance:
            raise RecipeError(f"metric={metric!r}; known: {', '.join(METRICS)}")
        value = float(distance[metric](wanted, found).double().mean())
        return value if value == value else float("inf")

    def mean(self, replay: BlockReplay, block: Block, metric: Metric = "kl") -> float:
        """Mean damage over the batches of the model as it is now; ``block`` is the first that is not finished."""
        outputs = replay.finish(block, self.options, self.batches)
        damages = [self.damage(output, index, metric) for index, output in outputs]
        return sum(damages) / len(damages)

    def now(self, metric: Metric = "kl") -> float:
        """Mean damage of the scene's model as it is now, run from its start."""
        walk = self._scene.walk(self.batches, "damage", to_the_end=True)
        block, replay = next(walk)
        try:
            return self.mean(replay, block, metric)
        finally:
            walk.close()

    def _answers(self, output: object, index: int) -> Float[Tensor, "positions values"]:
        """Rows of answers at the chosen positions, float32."""
        logits = getattr(output, "logits", None)
        values = logits if isinstance(logits, Tensor) else pytree.tree_leaves(output)[0]
        rows: Tensor = values.flatten(0, -2)
        places = self._places[index]
        if places.kept is None and len(rows) == places.tokens:
            rows = rows[places.rows]
        return rows.float()


@dataclass(frozen=True)
class _Places:
    """Where the answers to one batch are read.

    Attributes:
        kept: positions in every sequence, for models that can compute the logits of some positions only; else None.
        rows: the same or, in a padded batch, real tokens, as indices into ``[batch * seq_len]``.
        tokens: ``batch * seq_len``; answers of another number (one a sequence, patches of an image) are read whole.
    """

    kept: Int[Tensor, " kept"] | None
    rows: Int[Tensor, " rows"]
    tokens: int

    @classmethod
    def of(cls, scene: Scene, batch: Mapping[str, Tensor], can_keep: bool) -> _Places:
        main, mask = batch[scene.model.main_input_name], batch.get("attention_mask")
        sequences, length = main.shape[0], main.shape[1]
        if mask is not None and mask.shape == main.shape and not bool(mask.all()):
            real = mask.flatten().nonzero().flatten()
            return cls(None, _spread(real, sequences * POSITIONS).to(scene.device), main.numel())
        within = _spread(torch.arange(length), POSITIONS)
        rows = (torch.arange(sequences)[:, None] * length + within).flatten().to(scene.device)
        return cls(within.to(scene.device) if can_keep else None, rows, sequences * length)


def _spread(indices: Int[Tensor, " n"], count: int) -> Int[Tensor, " few"]:
    """At most ``count`` of the indices, evenly spread."""
    if len(indices) <= count:
        return indices
    return indices[torch.linspace(0, len(indices) - 1, count).round().long()]
