"""The damage that each candidate does alone: one FFN replaced, the final answers compared, everything put back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ffsplit.budget.ledger import Ledger
from ffsplit.budget.objective import Metric, Objective
from ffsplit.budget.scene import Scene
from ffsplit.calibrate.layer import LayerData
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.families import FFNSite, replace
from ffsplit.families.blocks import Block
from ffsplit.families.surgery import restore
from ffsplit.methods.registry import MethodConfig, get_method

Candidates = Sequence[Sequence[MethodConfig]]


def measure(scene: Scene, candidates: Candidates, objective: Objective, metric: Metric = "kl") -> list[list[float]]:
    """Damage of every candidate, with all other FFNs dense.

    Args:
        scene: the dense model.
        candidates: for each FFN in execution order, the methods to try; each is fitted on the dense model's inputs.
        objective: what to compare, on which batches.
        metric: of the comparison.

    Returns:
        For each FFN the damage of its candidates, in their order; from the scene's store where it is known there.
    """
    known = [_ledger(scene.store, index, metric, objective.batches) for index in range(len(candidates))]
    found = [[one.get(_key(config)) for config in row] for one, row in zip(known, candidates, strict=True)]
    if all(damage is not None for row in found for damage in row):
        return [list(map(float, row)) for row in found]  # type: ignore[arg-type]
    for block, replay in scene.walk(None, "measure", to_the_end=True):
        indices = [scene.index_of(site) for site in block.sites]
        if all(damage is not None for index in indices for damage in found[index]):
            continue
        inputs = replay.capture(block)
        for site, index in zip(block.sites, indices, strict=True):
            data = scene.layer_data(site, inputs[site.name])
            for number, config in enumerate(candidates[index]):
                damage = known[index].get(_key(config))  # the row may hold it twice
                if damage is None:
                    damage = _damage(scene, replay, block, site, data, config, objective, metric)
                    known[index].put(_key(config), damage)
                found[index][number] = damage
            inputs[site.name].drop()
    return [[damage for damage in row if damage is not None] for row in found]


@torch.no_grad()
def _damage(
    scene: Scene,
    replay: BlockReplay,
    block: Block,
    site: FFNSite,
    data: LayerData,
    config: MethodConfig,
    objective: Objective,
    metric: Metric,
) -> float:
    module = get_method(config.method).apply(data, config.quick())
    taken = replace(scene.model, site, module.requires_grad_(False).to(device=scene.device, dtype=data.dtype))
    try:
        return objective.mean(replay, block, metric)
    finally:
        restore(scene.model, taken)


def _ledger(store: Path | None, index: int, metric: Metric, batches: int) -> Ledger:
    """The measured damages of one FFN."""
    return Ledger(None if store is None else store / f"{metric}-{batches}-ffn-{index:04d}.json")


def _key(config: MethodConfig) -> str:
    content = json.dumps(config.quick().model_dump(mode="json"), sort_keys=True)
    return f"{config.method}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
