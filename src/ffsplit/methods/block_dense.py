"""Block-dense: a block-diagonal matrix followed by a dense one, in place of every matrix of the FFN."""

from __future__ import annotations

from typing import Literal

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.blockwise import BlockwiseConfig, blockwise_structure, fit_blockwise
from ffsplit.methods.registry import method


class BlockDenseConfig(BlockwiseConfig):
    """The blocks.

    Attributes:
        blocks: of each matrix's inputs, each with a low rank of its own (one block is plain low rank); fewer where some
            would be empty.
    """

    method: Literal["block-dense"] = "block-dense"


def structure(shape: FFNShape, config: BlockDenseConfig) -> SumSpec:
    """One block-dense branch of all neurons, the same share of the parameters for every matrix."""
    return blockwise_structure("block-dense", shape, config)


@method(
    "block-dense",
    summary="every matrix a block-diagonal one followed by a dense one",
    paper="StructuredFFN, arXiv 2406.16450",
    budget=("keep",),
    as_sum="one block-dense branch of all neurons",
    config=BlockDenseConfig,
    structure=structure,
    status="experimental",
)
def block_dense(data: LayerData, config: BlockDenseConfig) -> SumFFN:
    """Every matrix on its own, `down` after a refit."""
    return fit_blockwise(data, config, structure(FFNShape.of(data.ffn), config))
