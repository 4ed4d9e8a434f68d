"""How a projection ``x W^T`` of a branch is stored. One file a storage: its structure and its module."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from ffsplit.ffn.projections.base import Projection, StorageSpec
from ffsplit.ffn.projections.block_dense import BlockDense, BlockDenseSpec
from ffsplit.ffn.projections.dense import Dense, DenseSpec
from ffsplit.ffn.projections.float8 import Float8, Float8Spec
from ffsplit.ffn.projections.int8_dynamic import Int8Dynamic, Int8DynamicSpec
from ffsplit.ffn.projections.low_rank import LowRank, LowRankSpec
from ffsplit.ffn.projections.masked import Masked, MaskedSpec
from ffsplit.ffn.projections.monarch import Monarch, MonarchSpec
from ffsplit.ffn.projections.n_m import NM, NMSpec
from ffsplit.ffn.projections.outlier_columns import OutlierColumns, OutlierColumnsSpec
from ffsplit.ffn.projections.outlier_weights import OutlierWeights, OutlierWeightsSpec
from ffsplit.ffn.projections.packed import Packed, PackedSpec
from ffsplit.ffn.projections.tied import Tied, TiedSpec

ProjectionSpec = Annotated[
    BlockDenseSpec
    | DenseSpec
    | Float8Spec
    | Int8DynamicSpec
    | LowRankSpec
    | MaskedSpec
    | MonarchSpec
    | NMSpec
    | OutlierColumnsSpec
    | OutlierWeightsSpec
    | PackedSpec
    | TiedSpec,
    Field(discriminator="kind"),
]
"""Any storage, told apart by its ``kind``."""

STORAGES: dict[type[StorageSpec], type[Projection]] = {
    BlockDenseSpec: BlockDense,
    DenseSpec: Dense,
    Float8Spec: Float8,
    Int8DynamicSpec: Int8Dynamic,
    LowRankSpec: LowRank,
    MaskedSpec: Masked,
    MonarchSpec: Monarch,
    NMSpec: NM,
    OutlierColumnsSpec: OutlierColumns,
    OutlierWeightsSpec: OutlierWeights,
    PackedSpec: Packed,
    TiedSpec: Tied,
}


def empty_projection(spec: StorageSpec, dtype: torch.dtype, device: torch.device) -> Projection:
    """An uninitialised projection of the given structure, ready to be loaded into."""
    return STORAGES[type(spec)].empty(spec, dtype, device)


__all__ = [
    "NM",
    "STORAGES",
    "BlockDense",
    "BlockDenseSpec",
    "Dense",
    "DenseSpec",
    "Float8",
    "Float8Spec",
    "Int8Dynamic",
    "Int8DynamicSpec",
    "LowRank",
    "LowRankSpec",
    "Masked",
    "MaskedSpec",
    "Monarch",
    "MonarchSpec",
    "NMSpec",
    "OutlierColumns",
    "OutlierColumnsSpec",
    "OutlierWeights",
    "OutlierWeightsSpec",
    "Packed",
    "PackedSpec",
    "Projection",
    "ProjectionSpec",
    "StorageSpec",
    "Tied",
    "TiedSpec",
    "empty_projection",
]
