"""How important each FFN of the dense model is, by what it does to the residual stream: one pass, nothing is trained.

The residual stream ``r`` that an FFN's output is added to is measured as the output of its block with the FFN masked
(its ``down`` gives zeros), and ``r + F`` as the output of the block as it is. In pre-norm models these are the papers'
definitions, without knowing the family's code; where a norm follows the addition (BERT) both are seen behind the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ffsplit.budget.scene import Scene
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.errors import ModelError
from ffsplit.families import FFNSite
from ffsplit.families.blocks import Block
from ffsplit.ops.importance import cosine_distance, relative_update

UpdateMetric = Literal["cosine", "relative-l1", "relative-l2", "block-influence"]
PerToken = Callable[[Float[Tensor, "tokens d"], Float[Tensor, "tokens d"]], Float[Tensor, " tokens"]]
PER_TOKEN: dict[str, PerToken] = {
    "cosine": cosine_distance,
    "relative-l1": partial(relative_update, order=1),
    "relative-l2": partial(relative_update, order=2),
    "block-influence": cosine_distance,
}


def update_importance(scene: Scene, metric: UpdateMetric, batches: int | None = None) -> list[float]:
    """The mean over tokens of how much each FFN changes the residual stream.

    Args:
        scene: the dense model.
        metric: ``cosine`` (LLM-Drop), ``relative-l1``, ``relative-l2``; or ``block-influence`` (ShortGPT), which
            compares the block's input with its output and ranks the FFN by its whole block.
        batches: how many to look at; all for None.

    Raises:
        ModelError: ``block-influence`` and the model has no blocks, or blocks whose input cannot be told.
    """
    scores = [0.0] * len(scene.shapes)
    for block, replay in scene.walk(batches, "importance"):
        given: list[Tensor] = []
        if metric == "block-influence":
            given, whole = _ends(replay, block)
        else:
            whole = [output for _, output in replay.outputs(block)]
        for site in block.sites:
            if metric != "block-influence":
                with masked(replay.model, site):
                    given = [output for _, output in replay.outputs(block)]
            pairs = zip(given, whole, strict=True)
            scores[scene.index_of(site)] = _mean(replay, site, pairs, PER_TOKEN[metric])
    return scores


def _mean(replay: BlockReplay, site: FFNSite, pairs: Iterator[tuple[Tensor, Tensor]], measure: PerToken) -> float:
    """The mean over the real tokens of all batches."""
    total, tokens = 0.0, 0
    for index, (without, with_it) in enumerate(pairs):
        both = zip(replay.rows(index, site, without), replay.rows(index, site, with_it), strict=True)
        for before, after in both:
            total += float(measure(before, after).sum())
            tokens += len(before)
    if not tokens:
        raise ModelError(f"{site.name}: the calibration text never reached this FFN")
    return total / tokens


@contextmanager
def masked(model: nn.Module, site: FFNSite) -> Iterator[None]:
    """Let an FFN give zeros."""
    down = model.get_submodule(site.down)
    handle = down.register_forward_hook(lambda _module, _args, output: torch.zeros_like(output))
    try:
        yield
    finally:
        handle.remove()


def _ends(replay: BlockReplay, block: Block) -> tuple[list[Tensor], list[Tensor]]:
    """A block's inputs and outputs, one tensor a batch."""
    if block.whole_model:
        raise ModelError(
            f"metric='block-influence' compares the two ends of a block, and {type(replay.model).__name__} is no chain "
            "of blocks; choose another metric"
        )
    leaves: list[list[Tensor]] = []

    def keep(_module: nn.Module, args: object, kwargs: object) -> None:
        inside = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # Copies: a block may work on its input in place. Attention masks, which are large, have four dimensions.
        leaves.append([leaf.clone() for leaf in inside if leaf.is_floating_point() and leaf.dim() <= 3])

    handle = replay.model.get_submodule(block.path).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        outputs = [output for _, output in replay.outputs(block)]
    finally:
        handle.remove()
    ends = [
        next((leaf for leaf in inside if leaf.shape == out.shape), None)
        for inside, out in zip(leaves, outputs, strict=True)
    ]
    found = [end for end in ends if end is not None]
    if len(found) != len(outputs):
        raise ModelError(
            f"metric='block-influence': {block.path} takes no tensor of the shape that it returns; choose another "
            "metric"
        )
    return found, outputs
