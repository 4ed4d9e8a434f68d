"""How each storage of a projection is written: as a node on its stored codes, as plain float weights, or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ffsplit.errors import ModelError
from ffsplit.export.blocks import BLOCKS, block_codes, block_size
from ffsplit.export.nodes import NBits, Node, Plain, RowInt8
from ffsplit.ffn.projections import (
    Dense,
    Float8Spec,
    Int8Dynamic,
    Int8DynamicSpec,
    LowRank,
    OutlierColumns,
    Packed,
    PackedSpec,
    Projection,
    StorageSpec,
    Tied,
)
from ffsplit.ffn.spec import SumSpec
from ffsplit.kernels import cpu
from ffsplit.ops.outliers import other_columns

Form = Literal["kept", "decoded", "refused"]
_KEPT = ("dense", "low_rank", "block_dense", "monarch", "int8_dynamic", "tied")
_DECODED = ("masked", "n_m", "outlier_weights")


def form(spec: StorageSpec) -> Form:
    """``kept`` as it is stored, ``decoded`` to a dense float32 matrix of the same weights, or ``refused``."""
    if isinstance(spec, PackedSpec):
        return "kept" if block_size(spec) is not None else "decoded"
    if isinstance(spec, Float8Spec):
        return "refused" if spec.activations else "decoded"
    if spec.kind == "outlier_columns":
        return "kept"
    if spec.kind in _KEPT:
        return "kept"
    return "decoded" if spec.kind in _DECODED else "refused"


def refuse_inexpressible(specs: Iterable[tuple[str, SumSpec]]) -> None:
    """Raise ModelError for the first FFN, by name, with something in it that no ONNX graph here can compute."""
    for name, spec in specs:
        if spec.lookup is not None:
            raise ModelError(f"{name}: lookup tables have no ONNX form")
        for projection in spec.projections:
            if form(projection) == "refused":
                raise ModelError(f"{name}: the storage {projection.kind!r} ({projection.describe()}) has no ONNX form")


def notes(specs: Iterable[SumSpec]) -> list[str]:
    """What becomes larger or does not get faster, a sentence each; empty if everything is kept as stored."""
    listed = list(specs)
    decoded = Counter(p.describe() for spec in listed for p in spec.projections if form(p) == "decoded")
    told = [
        f"{count} projections ({how}) are written as dense float32 of the same values" for how, count in decoded.items()
    ]
    if any(isinstance(p, PackedSpec) and form(p) == "decoded" for spec in listed for p in spec.projections):
        told.append(f"codes stay codes only in groups of a multiple of {BLOCKS[-1]} columns, or one group a row")
    if any(spec.skip is not None or any(b.selector is not None for b in spec.branches) for spec in listed):
        told.append("what is left out token by token is exported as masks, which saves no time")
    if cpu.SATURATES and any(isinstance(p, Int8DynamicSpec) for spec in listed for p in spec.projections):
        told.append(
            "int8 weights are written as uint8, for this processor's kernels for int8 ones overflow; exported on one "
            "with integer dot products (VNNI), the graph runs faster there"
        )
    return told


@dataclass(frozen=True)
class Written:
    """A projection as modules for the tracer: ``then(node(x))``.

    Attributes:
        node: what reads the projection's input.
        then: what follows, if anything.
    """

    node: Node
    then: nn.Module | None = None

    def module(self) -> nn.Module:
        return self.node if self.then is None else nn.Sequential(self.node, self.then)


def written(projection: Projection) -> Written:
    """The modules of one projection, all floats as float32.

    Raises:
        ModelError: its storage is refused, see :func:`form`.
    """
    spec = projection.spec
    found = form(spec)
    if found == "refused":
        raise ModelError(f"the storage {spec.kind!r} ({spec.describe()}) has no ONNX form")
    if found == "decoded" or isinstance(projection, Dense) or 0 in _inner_sizes(projection):
        return Written(Plain(projection.dense(torch.float32)))
    if isinstance(projection, LowRank):
        return Written(Plain(projection.b), Plain(projection.a))
    if isinstance(projection, Packed):
        inputs = None if projection.input_scale is None else projection.input_scale.view(torch.float16).float()
        return Written(NBits(block_codes(projection), inputs))
    if isinstance(projection, Int8Dynamic):
        return Written(RowInt8(projection.codes, projection.row_scale))
    if isinstance(projection, OutlierColumns):
        return Written(_Outliers(projection))
    if isinstance(projection, Tied):
        return Written(_WithOwner(projection))
    return Written(_AsItIs(projection))


def _inner_sizes(projection: Projection) -> tuple[int, ...]:
    """Sizes that may be zero, of which no graph can be made: a product over nothing is the zero matrix."""
    ranks = (getattr(projection.spec, "rank", 1),) if isinstance(projection, LowRank) else ()
    return (*projection.spec.shape, *ranks)


class _AsItIs(Node):
    """A projection whose own forward is float operations that every exporter knows."""

    def __init__(self, projection: Projection) -> None:
        super().__init__()
        self.projection = projection.float()
        self.key = ("as it is", id(projection))
        self.rows = projection.spec.shape[0]

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return self.projection(x)  # type: ignore[no-any-return]


class _Outliers(Node):
    """A packed matrix of most columns and a float one of the others."""

    index: Tensor
    others: Tensor

    def __init__(self, projection: OutlierColumns) -> None:
        super().__init__()
        self.packed = written(projection.packed).module()
        self.values = Plain(projection.values)
        self.register_buffer("index", projection.index.long())
        self.register_buffer("others", other_columns(projection.index, projection.spec.shape[1]))
        self.key = ("outliers", id(projection))
        self.rows = projection.spec.shape[0]

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        rest: Tensor = self.packed(x.index_select(-1, self.others))
        return rest + self.values(x.index_select(-1, self.index))  # type: ignore[no-any-return]


class _WithOwner(Node):
    """The owner's projection, written once more, and a low-rank difference."""

    def __init__(self, projection: Tied) -> None:
        super().__init__()
        self.owner = written(projection.owner).module()
        self.difference: nn.Module | None = None
        if projection.a is not None and projection.b is not None:
            self.difference = nn.Sequential(Plain(projection.b), Plain(projection.a))
        self.key = ("tied", id(projection))
        self.rows = projection.spec.shape[0]

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        out: Tensor = self.owner(x)
        return out if self.difference is None else out + self.difference(x)
