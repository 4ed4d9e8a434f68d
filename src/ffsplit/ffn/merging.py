"""Makes the merged products of a sum; see :mod:`ffsplit.ffn.merged`, which runs and keeps them.

Matrices that are given the same inputs stand below each other in one matrix: the ``up`` and ``gate`` of all branches,
of low-rank ones their first factors. Matrices whose outputs are added stand beside each other: the ``down`` of all
branches, of low-rank ones their last factors. Float matrices are merged with float ones, packed ones with packed ones:
for few tokens as codes (as far as the CPU's int4 kernel takes them), for many decoded. Int8 matrices whose inputs
become int8 too are merged below each other for few tokens, so that a token is rounded once; every ``down`` has scales
of its own.

The merged matrices are copies. Packed and int8 ones take the place of those that the kernel would need anyway. Float
ones cost memory: of a heavy dense and a low-rank branch, all but the factors that are neither first nor last. On CPUs
they are made where they were measured to pay: in half precision, and for few tokens. On GPUs, where nine products of a
few microseconds each take their turns, they are made for any number of tokens, as far as there is room for decoded
matrices.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from ffsplit.ffn.activated import activated
from ffsplit.ffn.projections import Dense, Int8Dynamic, LowRank, Packed, Projection
from ffsplit.kernels import cpu, cpu_int4, cpu_int8
from ffsplit.kernels.cache import counted, decoded_room
from ffsplit.kernels.cpu_int4 import Int4Matrix, Int4Parts, int4_linear, int4_matrix, joined
from ffsplit.kernels.cpu_int8 import FewInt8Matrix, Int8Parts, few_int8_matrix, few_product
from ffsplit.kernels.dispatch import SMALLEST, may_round

if TYPE_CHECKING:
    from ffsplit.ffn.sum import Branch

MOST_TOKENS = 128 if cpu.TILES else 32 if cpu.FAST_BFLOAT16 else 4
"""Up to how many tokens merging float matrices is worth their copies: the faster products are, the more."""
MOST_EVER = max(MOST_TOKENS, cpu_int8.FEW, cpu_int8.FEW_OF_SMALL, *cpu_int4.MOST_TOKENS.values())
HALF_PRECISION = (torch.bfloat16, torch.float16)
Piece = Tensor | Int4Parts | Int8Parts


class NoRoom(Exception):
    """The limit of decoded matrices leaves none."""


@dataclass(frozen=True)
class Product:
    """One product in place of several.

    Attributes:
        matrix: merged; one of floats may have a dtype of its own.
        sizes: rows (or columns) of each of the matrices in it.
        places: whose outputs (or inputs) these are.
    """

    matrix: Tensor | Int4Matrix | FewInt8Matrix
    sizes: list[int]
    places: tuple[int, ...]

    def __call__(self, x: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens rows"]:
        if isinstance(self.matrix, Int4Matrix):
            return int4_linear(x, self.matrix)
        if isinstance(self.matrix, FewInt8Matrix):
            return few_product(x, self.matrix).to(x.dtype)
        return linear(x.to(self.matrix.dtype), self.matrix).to(x.dtype)


@dataclass(frozen=True)
class Between:
    """What a branch does between the products, taken out of its modules, where looking takes longer.

    Attributes:
        act: its activation.
        up_bias: of its neurons.
        gate_bias: of their gates.
        up: second factor of a low-rank ``up``.
        gate: that of a low-rank ``gate``.
        down: first factor of a low-rank ``down``.
        twice: whether ``down`` is given its inputs twice, for both halves of its codes.
    """

    act: nn.Module
    up_bias: Tensor | None
    gate_bias: Tensor | None
    up: Tensor | None
    gate: Tensor | None
    down: Tensor | None
    twice: bool

    @classmethod
    def of(cls, branch: Branch, *, decoded: bool) -> Between:
        codes = isinstance(branch.down, Packed) and not decoded
        return cls(
            act=branch.act,
            up_bias=branch.up_bias,
            gate_bias=branch.gate_bias,
            up=_second(branch.up),
            gate=_second(branch.gate),
            down=branch.down.b if isinstance(branch.down, LowRank) else None,
            twice=codes and cpu_int4.halves(branch.down.spec.bits) == 2,
        )

    def __call__(
        self,
        up: Float[Tensor, "tokens rows"],
        gate: Float[Tensor, "tokens rows"] | None,
        out: Float[Tensor, "tokens columns"] | None = None,
    ) -> Float[Tensor, "tokens columns"]:
        """What the merged matrix of all ``down`` is given, from what that of all ``up`` and ``gate`` gives."""
        if self.up is not None:
            up = linear(up, self.up)
        if gate is not None and self.gate is not None:
            gate = linear(gate, self.gate)
        if self.down is not None:
            hidden = activated(self.act, up, gate, self.up_bias, self.gate_bias)
            return linear(hidden, self.down) if out is None else torch.mm(hidden, self.down.T, out=out)
        hidden = activated(self.act, up, gate, self.up_bias, self.gate_bias, out)
        return torch.cat([hidden, hidden], 1) if self.twice else hidden


def _second(projection: Projection | None) -> Tensor | None:
    return projection.a if isinstance(projection, LowRank) else None


@dataclass(frozen=True)
class MergedSum:
    """The products of a sum.

    Attributes:
        inner: of its inputs.
        between: of each branch.
        outer: of its hidden activations.
        most_tokens: for how many these are worth it.
    """

    inner: tuple[Product, ...]
    between: tuple[Between, ...]
    outer: tuple[Product, ...]
    most_tokens: int


@torch.no_grad()
def merge(branches: Sequence[Branch], dtype: torch.dtype, device: torch.device) -> MergedSum | None:
    """The merged matrices; None if there is nothing to merge, or something that cannot be."""
    projections = projections_of(branches)
    on_cpu = device.type == "cpu"
    pays = not on_cpu or (len(branches) > 1 and dtype in HALF_PRECISION)
    packed = all(isinstance(projection, Packed) for projection in projections)
    int8 = on_cpu and all(_is_few_int8(projection) for projection in projections)
    if not (pays or packed or int8):
        return None
    mergeable = int8 or all(_is_mergeable(projection, dtype, on_cpu) for projection in projections)
    if not mergeable or not all(_is_plain(branch) for branch in branches):
        return None
    if sum(projection.spec.shape[0] * projection.spec.shape[1] for projection in projections) < SMALLEST:
        return None
    inner, outer = _placed(branches)
    pieces = [(place, _first(it)) for place, it in inner], [(place, _last(it)) for place, it in outer]
    # A branch alone is run by its own matrices: nothing is copied, and what takes no calls of its modules is quicker.
    copies = not on_cpu and len(branches) > 1
    copied = sum(piece.nbytes for _, piece in (*pieces[0], *pieces[1]) if isinstance(piece, Tensor))
    if copies and copied > decoded_room(device):
        raise NoRoom
    apart = () if copies else (torch.float32,) if on_cpu else (dtype,)
    inner_products, outer_products = (_products(pieces[dim], dim, apart, count=copies) for dim in (0, 1))
    between = tuple(Between.of(branch, decoded=False) for branch in branches)
    return MergedSum(inner_products, between, outer_products, most_tokens(branches, device))


@torch.no_grad()
def merge_decoded(branches: Sequence[Branch], dtype: torch.dtype, device: torch.device) -> MergedSum | None:
    """The matrices of packed (and dense) branches, each decoded into the dtype in which it is multiplied fastest."""
    projections = projections_of(branches)
    known = all(type(it) is Packed or (type(it) is Dense and it.weight.dtype == dtype) for it in projections)
    any_packed = any(type(it) is Packed for it in projections)
    if not known or not any_packed or not all(_is_plain(branch) for branch in branches):
        return None
    sizes = {it: it.spec.shape[0] * it.spec.shape[1] for it in projections}
    if max(sizes.values()) < SMALLEST:
        return None
    wanted = {it: _product_dtype(it, dtype, device) for it in projections}
    inner, outer = _placed(branches)
    # A stored matrix that stands alone stays where it is.
    kept = [it for placed in (inner, outer) for _, it in placed if isinstance(it, Packed) or len(placed) > 1]
    if sum(sizes[it] * wanted[it].itemsize for it in kept) > decoded_room(device):
        raise NoRoom

    def products(placed: Sequence[tuple[int, Projection]], dim: int) -> tuple[Product, ...]:
        pieces = [
            (place, counted(it.stored().dense(wanted[it])) if isinstance(it, Packed) else _whole(it))
            for place, it in placed
        ]
        return _products(pieces, dim, (torch.float32,) if device.type == "cpu" else (), count=True)

    between = tuple(Between.of(branch, decoded=True) for branch in branches)
    return MergedSum(products(inner, 0), between, products(outer, 1), sys.maxsize)


def _placed(branches: Sequence[Branch]) -> tuple[list[tuple[int, Projection]], list[tuple[int, Projection]]]:
    """What is given the inputs, by the place of its outputs, and what gives outputs, by that of its inputs."""
    inner: list[tuple[int, Projection]] = []
    for index, branch in enumerate(branches):
        inner += [(2 * index, branch.up)] + ([] if branch.gate is None else [(2 * index + 1, branch.gate)])
    return inner, [(index, branch.down) for index, branch in enumerate(branches)]


def _product_dtype(projection: Projection, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    if not isinstance(projection, Packed):
        return dtype
    rounded = may_round() and cpu_int4.is_precise_enough(dtype, projection.spec.bits)
    return cpu.product_dtype(torch.empty(0, dtype=dtype, device=device), may_round=rounded)


def _products(
    pieces: Sequence[tuple[int, Piece]], dim: int, apart: tuple[torch.dtype, ...], *, count: bool
) -> tuple[Product, ...]:
    """One product for all float pieces of a dtype, and one for all packed ones that fit below or beside each other.

    Args:
        pieces: by place.
        dim: 0: below each other; 1: beside.
        apart: dtypes in which ``up`` and ``gate`` are two matrices: on CPUs a float32 product of both takes longer
            than two.
        count: what becomes one matrix is counted.
    """
    kinds: dict[object, list[tuple[int, Piece]]] = {}
    for place, piece in pieces:
        kinds.setdefault(_kind(piece, place, dim, apart), []).append((place, piece))
    groups = (([piece for _, piece in group], tuple(place for place, _ in group)) for group in kinds.values())
    return tuple(_product(*group, dim, count) for group in groups)


def _kind(piece: Piece, place: int, dim: int, apart: tuple[torch.dtype, ...]) -> object:
    """What pieces have in common that can be one matrix."""
    if isinstance(piece, Tensor):
        return (piece.dtype, place % 2) if dim == 0 and piece.dtype in apart else piece.dtype
    if isinstance(piece, Int4Parts):
        return piece.halves if dim == 0 else 1
    return "int8" if dim == 0 else ("int8", place)  # every `down` has scales, and inputs, of its own


def _product(pieces: Sequence[Piece], places: tuple[int, ...], dim: int, count: bool) -> Product:
    floats = [piece for piece in pieces if isinstance(piece, Tensor)]
    packed = [piece for piece in pieces if isinstance(piece, Int4Parts)]
    int8 = [piece for piece in pieces if isinstance(piece, Int8Parts)]
    sizes = [(piece if isinstance(piece, Tensor) else piece.codes).shape[dim] for piece in pieces]
    if int8:
        return Product(few_int8_matrix(int8), sizes, places)
    if packed:
        return Product(int4_matrix(joined(packed, dim)), sizes, places)
    if len(floats) == 1:
        return Product(floats[0], sizes, places)
    matrix = torch.cat(floats, dim)
    return Product(counted(matrix) if count else matrix, sizes, places)


def _first(projection: Projection) -> Piece:
    """What multiplies the inputs of a projection."""
    return projection.b.detach() if isinstance(projection, LowRank) else _whole(projection)


def _last(projection: Projection) -> Piece:
    """What gives the outputs of a projection."""
    return projection.a.detach() if isinstance(projection, LowRank) else _whole(projection)


def _whole(projection: Projection) -> Piece:
    if isinstance(projection, Packed):
        return projection.stored().int4()
    if isinstance(projection, Int8Dynamic):
        return Int8Parts(projection.codes, projection.row_scale)
    assert isinstance(projection, Dense)
    return projection.weight.detach()


def _is_plain(branch: Branch) -> bool:
    """Whether all of its neurons work for every token, and its biases are where they are watched."""
    return branch.selector is None and all(name in branch._parameters for name in ("up_bias", "gate_bias"))


def _is_mergeable(projection: Projection, dtype: torch.dtype, on_cpu: bool) -> bool:
    if isinstance(projection, Packed):
        return on_cpu and fits_int4(projection, dtype) and projection.input_scale is None
    names = {Dense: ("weight",), LowRank: ("a", "b")}.get(type(projection), ())
    factors = [projection._parameters.get(name) for name in names]
    return bool(factors) and all(factor is not None and factor.dtype == dtype for factor in factors)


def _is_few_int8(projection: Projection) -> bool:
    return isinstance(projection, Int8Dynamic) and cpu_int8.takes_few(1) and cpu_int8.fits(projection.spec.shape)


def fits_int4(projection: Packed, dtype: torch.dtype) -> bool:
    spec = projection.spec
    return cpu_int4.fits(spec.shape, spec.group) and cpu_int4.is_precise_enough(dtype, spec.bits)


def most_tokens(branches: Sequence[Branch], device: torch.device) -> int:
    """Up to how many tokens the kernel for few is the faster way for every matrix, and merging for those of floats."""
    return min(map(_most_tokens, projections_of(branches))) if device.type == "cpu" else sys.maxsize


def _most_tokens(projection: Projection) -> int:
    if isinstance(projection, Packed):
        return cpu_int4.most_tokens(projection.spec.bits)
    return cpu_int8.most_merged(projection.spec.shape) if isinstance(projection, Int8Dynamic) else MOST_TOKENS


def projections_of(branches: Sequence[Branch]) -> list[Projection]:
    """All of their matrices."""
    return [it for branch in branches for it in (branch.up, branch.gate, branch.down) if it is not None]
