"""Stage ``blocks``: every compressed FFN learns to give its dense original's outputs, on its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffsplit.recover.config import LR, Recovery
from ffsplit.recover.layers import Layer
from ffsplit.recover.whole import has_trainables, notes_of, prepared, settings_of
from ffsplit.recover.workers import Workers
from ffsplit.train.loop import Hooks, train

_SEED_STRIDE = 1_000_003
_LARGEST_SEED = 1 << 62


def distil_layer(
    config: Recovery, identity: str, state: Callable[[str], Path] | None, group: Workers
) -> Callable[[Layer], dict[str, Any] | None]:
    """What trains one layer: AdamW on ``||FFN(x) - sum(x)||^2 / ||FFN(x)||^2``, the best held-out weights kept.

    Args:
        config: steps, learning rate, batch size.
        identity: what an interrupted run and its continuation must share.
        state: gives the file for the state of a layer under way.
        group: the processes of this run; each does the same here.

    Reference: the blockwise local distillation of Puzzle, arXiv 2411.19146, section 3, with the FFN for the block.
    """
    # A layer has no adapters and no rest of the model beside its own weights.
    local = config.model_copy(update={"lora": None, "train": "ffn"})

    def work(layer: Layer) -> dict[str, Any] | None:
        if not has_trainables(layer.module, local):
            return None
        with prepared(layer.module, local):
            settings = settings_of(local, layer.inputs.device, config.lr or LR["blocks"], config.steps)
            hooks = Hooks(
                score=lambda: -layer.error(),
                score_start=True,
                state=None if state is None else state(f"blocks-{layer.index:04d}"),
                identity=f"{identity} {layer.name}",
                writes=group.first,
                label=layer.name,
            )
            standing = train(layer.module, _batch_of(layer, config), lambda rows: _loss(layer, rows), settings, hooks)
        return {"ffn": layer.name, **notes_of(standing)}

    return work


def _batch_of(layer: Layer, config: Recovery) -> Callable[[int], Tensor]:
    """The rows of batch n, drawn at random."""
    count = min(config.batch_size * config.seq_len, len(layer.inputs))

    def batch(number: int) -> Tensor:
        seed = (config.seed * _SEED_STRIDE + layer.index) * _SEED_STRIDE + number
        generator = torch.Generator().manual_seed(seed % _LARGEST_SEED)
        rows = torch.randint(len(layer.inputs), (count,), generator=generator)
        return layer.inputs[rows.to(layer.inputs.device)].float()

    return batch


def _loss(layer: Layer, rows: Tensor) -> Tensor:
    wanted = layer.wanted(rows)
    tiny = torch.finfo(torch.float32).tiny
    found: Tensor = layer.module(rows)
    return (found.float() - wanted).square().sum() / wanted.square().sum().clamp_min(tiny)
