"""Monarch (block-shuffle): two block-diagonal matrices and shuffles, in place of every matrix of the FFN."""

from __future__ import annotations

from typing import Literal

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.blockwise import BlockwiseConfig, blockwise_structure, fit_blockwise
from ffsplit.methods.registry import method


class MonarchConfig(BlockwiseConfig):
    """The blocks.

    Attributes:
        blocks: of each matrix's inputs and of its outputs; every cell of that grid has a low rank of its own. Fewer
            where some would be empty.
    """

    method: Literal["monarch"] = "monarch"


def structure(shape: FFNShape, config: MonarchConfig) -> SumSpec:
    """One Monarch branch of all neurons, the same share of the parameters for every matrix."""
    return blockwise_structure("monarch", shape, config)


@method(
    "monarch",
    summary="every matrix two block-diagonal ones with a shuffle between",
    paper="Monarch, arXiv 2204.00595; StructuredFFN, arXiv 2406.16450",
    budget=("keep",),
    as_sum="one Monarch branch of all neurons",
    config=MonarchConfig,
    structure=structure,
    status="experimental",
)
def monarch(data: LayerData, config: MonarchConfig) -> SumFFN:
    """Every matrix on its own, `down` after a refit."""
    return fit_blockwise(data, config, structure(FFNShape.of(data.ffn), config))
