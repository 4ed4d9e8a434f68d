"""How far the compressed prefix has moved the residual stream, and what an FFN would have to add to bring it back.

With ``r`` the residual stream that an FFN's output is added to, a block gives ``r + FFN(x)``. The dense model gives
``r_dense + FFN(x_dense)``; the model with a compressed prefix would give ``r + FFN(x)`` with the same dense FFN. The
difference of the two block outputs is the correction: a refit whose targets are ``FFN(x) + correction`` pulls the
stream back to the dense model's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ffsplit.calibrate.cache import Activations, TensorCache
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.families.blocks import Block

TOLERANCE = 0.05
"""Of the step that probes a block; rounding to bfloat16 takes about 0.01, a norm in between about 1."""


class DriftMeter:
    """A second stream through the model: what the dense model does on the same batches.

    Args:
        compressed: the stream of the model that is being compressed.
        cache: for the dense stream's activations.
        share: of the drift that a correction asks back, 0 to 1.
    """

    def __init__(self, compressed: BlockReplay, cache: TensorCache, share: float = 1.0) -> None:
        self.compressed = compressed
        self.cache = cache
        self.share = share
        self.dense = BlockReplay(compressed.model, compressed.batches, cache, compressed.device, compressed.progress)

    def corrections(self, block: Block, *, measure: bool) -> Activations | None:
        """Advance the dense stream over a block that is still dense; the corrections for its FFN.

        Args:
            block: its FFN has not been replaced yet.
            measure: False only advances (a resumed run whose FFN is already fitted, with the dense one in place).

        Returns:
            None where the idea does not apply: no blocks, several FFNs in a block, or one whose output is not simply
            added to the residual stream (a norm after the addition or on the output).
        """
        self.dense.advance(block)
        if not measure or block.whole_model or len(block.sites) != 1 or not adds_its_output(self.compressed, block):
            return None
        site = block.sites[0]
        store = Activations(self.cache, "correction-")
        for index, output in self.compressed.outputs(block):
            drift = (self.dense.block_output(block, index).to(output) - output) * self.share
            for rows in self.compressed.rows(index, site, drift):
                store.append(rows)
        return store


def adds_its_output(replay: BlockReplay, block: Block) -> bool:
    """Whether a block's output moves by what its FFN's output moves by, tried on the first batch.

    The step is as large as the residual stream and the comparison one of medians, so that the rounding of half
    precision and a few huge channels do not hide it.
    """
    site = block.sites[0]
    down = replay.model.get_submodule(site.down)

    def add(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return output + step.to(output)

    _, before = next(iter(replay.outputs(block, limit=1)))
    if before.shape[-1] != site.d_model:
        return False
    size = float(before.float().abs().median()) or 1.0
    step = size * torch.randn(site.d_model, generator=torch.Generator().manual_seed(0))
    handle = down.register_forward_hook(add)
    try:
        _, after = next(iter(replay.outputs(block, limit=1)))
    finally:
        handle.remove()
    moved = after.float() - before.float()
    miss = (moved - step.to(moved)).abs().median()
    return float(miss) <= TOLERANCE * float(step.abs().median())
