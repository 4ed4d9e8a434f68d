"""How important each sub-layer of the dense model is: what it does to the residual stream, in one pass.

The residual stream ``r`` that an FFN's output is added to is measured as the output of its block with the FFN masked
(its ``down`` gives zeros), and ``r + F`` as the output of the block as it is. In pre-norm models these are the papers'
definitions, without knowing the family's code; where a norm follows the addition (BERT) both are seen behind the norm.
For an attention the FFNs of its block are masked in both, so that nothing follows its own addition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ffsplit.budget.scene import Scene
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.errors import ModelError
from ffsplit.families import FFNSite
from ffsplit.families.attention_site import SubLayer
from ffsplit.families.blocks import Block
from ffsplit.families.masking import masked
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
    """The mean over tokens of how much each FFN, and then each of the scene's attentions, changes the residual stream.

    Args:
        scene: the dense model.
        metric: ``cosine`` (LLM-Drop), ``relative-l1``, ``relative-l2``; or ``block-influence`` (ShortGPT), which
            compares the block's input with its output and ranks a sub-layer by its whole block.
        batches: how many to look at; all for None.

    Raises:
        ModelError: ``block-influence`` and the model has no blocks, or blocks whose input cannot be told.
    """
    scores = [0.0] * len(scene.sub_layers)
    for block, replay in scene.walk(batches, "importance"):
        ends = _ends(replay, block) if metric == "block-influence" else None
        for index, site in scene.inside(block):
            given, whole = _with_and_without(replay, block, site) if ends is None else ends
            scores[index] = _mean(replay, site, zip(given, whole, strict=True), PER_TOKEN[metric])
    return scores


def _with_and_without(replay: BlockReplay, block: Block, site: SubLayer) -> tuple[list[Tensor], list[Tensor]]:
    """A block's outputs without and with a sub-layer, one tensor a batch."""
    quiet = [] if isinstance(site, FFNSite) or block.whole_model else [ffn.down for ffn in block.sites]
    with masked(replay.model, *quiet, site.down):
        given = [output for _, output in replay.outputs(block)]
    with masked(replay.model, *quiet):
        return given, [output for _, output in replay.outputs(block)]


def _mean(replay: BlockReplay, site: SubLayer, pairs: Iterator[tuple[Tensor, Tensor]], measure: PerToken) -> float:
    """The mean over the real tokens of all batches."""
    total, tokens = 0.0, 0
    for index, (without, with_it) in enumerate(pairs):
        both = zip(replay.rows(index, site, without), replay.rows(index, site, with_it), strict=True)
        for before, after in both:
            total += float(measure(before, after).sum())
            tokens += len(before)
    if not tokens:
        raise ModelError(f"{site.name}: the calibration text never reached it")
    return total / tokens


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
