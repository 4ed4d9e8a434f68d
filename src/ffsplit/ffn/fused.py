"""The branches of a sum as the kernels over whole FFNs want them: two at a time, their tensors in a row."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ffsplit.ffn.activated import activation_name
from ffsplit.ffn.places import Held, Place, tensors_at
from ffsplit.ffn.projections import Dense, Packed
from ffsplit.ffn.watched import WatchedBranches
from ffsplit.ffn.weights import joined_biases
from ffsplit.kernels.cache import counted, is_capturing
from ffsplit.kernels.dense_ffn import DenseFFN
from ffsplit.kernels.dispatch import FLOATS, as_autocast, belong, is_differentiated, takes_kernels
from ffsplit.kernels.float8_ffn import float8_ffn, run_float8, wants_float8
from ffsplit.kernels.low_bit import (
    ALIGNMENT,
    BRANCH_TENSORS,
    DENSE_BITS,
    TOKENS,
    LowBitFFN,
    LowBitShape,
    low_bit_ffn,
    takes,
)

if TYPE_CHECKING:
    from ffsplit.ffn.sum import Branch


@dataclass(frozen=True)
class _Known:
    """What was found out about the branches of a sum, with the places where it was found.

    Attributes:
        modules: where the modules are on which it depends, and which they were.
        tensors: where the tensors are, in the order of :class:`ffsplit.kernels.low_bit.LowBitFFN`; None: there is none.
        shapes: of pairs of branches; None: the kernels do not know them.
    """

    modules: Held
    tensors: tuple[Place | None, ...]
    shapes: tuple[LowBitShape, ...] | None

    @classmethod
    def of(cls, branches: Sequence[Branch]) -> _Known:
        names = ("act", "up", "gate", "down", "selector")
        shapes = low_bit_shapes(branches)
        return cls(
            Held.at([(branch._modules, name) for branch in branches for name in names]),
            () if shapes is None else tuple(place for branch in branches for place in _places(branch)),
            shapes,
        )


class FusedBranches(WatchedBranches[_Known, list[LowBitFFN]]):
    """Runs the branches of a sum by kernels over whole FFNs, where there are any for them."""

    def _look(self, branches: Sequence[Branch]) -> _Known:
        return _Known.of(branches)

    def __call__(
        self, x: Float[Tensor, "*tokens d_model"], branches: Sequence[Branch], bias: Tensor | None
    ) -> Tensor | None:
        """The outputs of all branches and the bias together; None where the kernels do not apply."""
        # Before anything else: on other devices this must cost nothing.
        if not x.is_cuda or not branches:
            return None
        if torch.compiler.is_compiling():
            return _traced(x, branches, bias)
        if not takes_kernels(x, ()):
            return None
        known = self._found(branches)
        if known.shapes is None:
            return None
        tensors = tensors_at(known.tensors)
        if is_differentiated([bias, *tensors]):
            return None
        if takes(x, known.shapes):
            return self._few(x, tensors, bias, known.shapes)
        return self._many(x, branches, [*tensors, bias], bias, known.shapes[0].act)

    def _few(
        self, x: Tensor, tensors: list[Tensor | None], bias: Tensor | None, shapes: Sequence[LowBitShape]
    ) -> Tensor | None:
        """Launches, made ready once for every number of tiles of tokens, as long as the tensors stay where they are."""
        tokens = x.numel() // x.shape[-1]

        def make(addresses: list[int]) -> list[LowBitFFN]:
            fits = belong(x, [*tensors, bias]) and not any(address % ALIGNMENT for address in addresses)
            parts = zip(_pairs(tensors, bias), shapes, strict=True)
            made = [LowBitFFN(part, shape, tokens, x.dtype, x.device.index) for part, shape in parts] if fits else []
            return made if all(launch.is_compiled for launch in made) else []

        launches = self._launch((-(-tokens // TOKENS), x.dtype, x.device), [*tensors, bias], make)
        return _added([launch(x) for launch in launches])

    def _many(
        self, x: Tensor, branches: Sequence[Branch], sources: Sequence[Tensor | None], bias: Tensor | None, act: str
    ) -> Tensor | None:
        """All branches as one dense FFN, in float8 if that was asked for; None if it may not be kept."""
        if not takes_kernels(x, sources) or not belong(x, sources) or x.dtype not in FLOATS:
            return None
        if as_autocast(x) is not x:  # a kept matrix would be cast at every forward
            return None
        d_ff = sum(branch.up.spec.shape[0] for branch in branches)
        if wants_float8(x, d_ff) and (self.derived.holds("float8", sources) or not is_capturing(x.device)):
            made = self.derived.get("float8", sources, lambda: float8_ffn(_decoded(branches, bias, act, x.dtype)))
            return run_float8(x, made)
        weights = sum(math.prod(matrix.spec.shape) for b in branches for matrix in (b.up, b.gate, b.down) if matrix)
        key = "dense", x.dtype
        if not self.derived.has_room(key, sources, weights * x.dtype.itemsize):
            return None
        return self.derived.get(key, sources, lambda: _decoded(branches, bias, act, x.dtype, keep=True))(x)


def _traced(x: Tensor, branches: Sequence[Branch], bias: Tensor | None) -> Tensor | None:
    """The same for few tokens as operators, for compilers."""
    shapes = low_bit_shapes(branches)
    if shapes is None or not takes(x, shapes):
        return None
    tensors = tensors_at(place for branch in branches for place in _places(branch))
    if is_differentiated([x, bias, *tensors]) or not belong(x, [*tensors, bias]):
        return None
    parts = zip(_pairs(tensors, bias), shapes, strict=True)
    return _added([low_bit_ffn(x, part, shape.numbers()) for part, shape in parts])


def _added(outputs: Sequence[Tensor]) -> Tensor | None:
    """Their sum; None if there are none."""
    return functools.reduce(operator.add, outputs) if outputs else None


def _pairs(tensors: Sequence[Tensor | None], bias: Tensor | None) -> list[list[Tensor | None]]:
    """Tensors of two branches at a time; the first pair adds the bias."""
    step = 2 * BRANCH_TENSORS
    return [[*tensors[at : at + step], None if at else bias] for at in range(0, len(tensors), step)]


def _decoded(
    branches: Sequence[Branch], bias: Tensor | None, act: str, dtype: torch.dtype, *, keep: bool = False
) -> DenseFFN:
    """All branches as one dense FFN; one that is kept is counted."""
    ups, sizes = [branch.up.dense(dtype) for branch in branches], [branch.up.spec.shape[0] for branch in branches]
    gates = [branch.gate.dense(dtype) for branch in branches if branch.gate is not None]
    inner = torch.cat([*ups, *gates])
    down = torch.cat([branch.down.dense(dtype) for branch in branches], dim=1)
    return DenseFFN(
        counted(inner) if keep else inner,
        counted(down) if keep else down,
        joined_biases([branch.up_bias for branch in branches], sizes, dtype),
        joined_biases([branch.gate_bias for branch in branches], sizes, dtype),
        bias,
        act,
    )


def low_bit_shapes(branches: Sequence[Branch]) -> tuple[LowBitShape, ...] | None:
    """Branches two at a time, as far as the kernels know their storages; None if there is one that they do not know."""
    known = [_known(branch) for branch in branches]
    if any(one is None for one in known) or not any(isinstance(branch.up, Packed) for branch in branches):
        return None
    shapes = []
    for at in range(0, len(known), 2):
        shape = _joined([one for one in known[at : at + 2] if one is not None])
        if shape is None or not shape.is_supported:
            return None
        shapes.append(shape)
    return tuple(shapes)


def _known(branch: Branch) -> LowBitShape | None:
    """The shape of one branch; a dense one takes over the group of the branch beside it (0 until then)."""
    act = activation_name(branch.act)
    matrices = [branch.up, branch.down] + ([] if branch.gate is None else [branch.gate])
    if act is None or branch.selector is not None:
        return None
    neurons, d_model = branch.up.spec.shape
    gated = branch.gate is not None
    if all(type(matrix) is Dense for matrix in matrices):
        return LowBitShape(d_model, (neurons,), (DENSE_BITS,), 0, gated, act)
    if not all(type(matrix) is Packed and matrix.input_scale is None for matrix in matrices):
        return None
    grids = {(matrix.spec.bits, matrix.spec.group) for matrix in matrices}
    if len(grids) != 1:
        return None
    ((bits, group),) = grids
    return LowBitShape(d_model, (neurons,), (bits,), group, gated, act)


def _joined(known: Sequence[LowBitShape]) -> LowBitShape | None:
    """Two branches as one; None if their groups, gates or activations differ."""
    groups = {one.group for one in known if one.group}
    if len(groups) > 1 or len({(one.gated, one.act) for one in known}) != 1:
        return None
    first = known[0]
    # A pair of dense branches beside packed ones may have any tiling of its own.
    group = groups.pop() if groups else 128
    neurons = tuple(size for one in known for size in one.neurons)
    bits = tuple(width for one in known for width in one.bits)
    return LowBitShape(first.d_model, neurons, bits, group, first.gated, first.act)


def _places(branch: Branch) -> list[Place | None]:
    """Where the tensors are, in the order of :class:`ffsplit.kernels.low_bit.LowBitFFN`, without the last."""
    found: list[Place | None] = []
    for matrix in (branch.gate, branch.up, branch.down):
        if isinstance(matrix, Packed):
            buffers: dict[str, Any] = matrix._buffers
            found.extend((buffers, name) for name in ("codes", "scale", "zero", "row_scale"))
        else:
            found.extend([None if matrix is None else (matrix._parameters, "weight"), None, None, None])
    return [*found, (branch._parameters, "gate_bias"), (branch._parameters, "up_bias")]
