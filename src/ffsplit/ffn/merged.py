"""All branches of a sum in few products, for few tokens: there every product costs something whatever its size.

Matrices that are given the same inputs stand below each other in one matrix: the ``up`` and ``gate`` of all branches,
of low-rank ones their first factors. Matrices whose outputs are added stand beside each other: the ``down`` of all
branches, of low-rank ones their last factors. Float matrices are merged with float ones, packed ones (as far as the
CPU's int4 kernel takes them) with packed ones.

The merged matrices are copies. Packed ones take the place of those that the kernel would need anyway. Float ones cost
memory: of a heavy dense and a low-rank branch, all but the factors that are neither first nor last. They are made where
they were measured to pay: in half precision, and for very few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from ffsplit.ffn.places import Held, Place, held_at, is_unchanged
from ffsplit.ffn.projections import Dense, LowRank, Packed, Projection
from ffsplit.kernels import cpu_int4
from ffsplit.kernels.cache import State, state_of
from ffsplit.kernels.cpu_int4 import Int4Matrix, Int4Parts, int4_linear, int4_matrix, joined
from ffsplit.kernels.dispatch import FLOATS, SMALLEST, is_traced, takes_kernels

if TYPE_CHECKING:
    from ffsplit.ffn.sum import Branch

MOST_TOKENS = 4
"""Up to how many tokens merging float matrices is worth their copies."""
MOST_EVER = max(MOST_TOKENS, *cpu_int4.MOST_TOKENS.values())
HALF_PRECISION = (torch.bfloat16, torch.float16)
Piece = Tensor | Int4Parts


@dataclass(frozen=True)
class Product:
    """One product in place of several.

    Attributes:
        matrix: merged.
        sizes: rows (or columns) of each of the matrices in it.
        places: whose outputs (or inputs) these are.
    """

    matrix: Tensor | Int4Matrix
    sizes: list[int]
    places: tuple[int, ...]

    def __call__(self, x: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens rows"]:
        return linear(x, self.matrix) if isinstance(self.matrix, Tensor) else int4_linear(x, self.matrix)


@dataclass(frozen=True)
class MergedSum:
    """The products of a sum, of its inputs and of its hidden activations; for how many tokens these are worth it."""

    inner: tuple[Product, ...]
    outer: tuple[Product, ...]
    most_tokens: int


@dataclass(frozen=True)
class Watched:
    """What a merged sum (or the answer that there is none) was made from, to be looked at before every use.

    Attributes:
        merged: None if the branches cannot be merged.
        branches: these.
        held: what stood where in them.
        tensors: among these.
        state: version and address of each tensor.
    """

    merged: MergedSum | None
    branches: tuple[Branch, ...]
    held: tuple[Held, ...]
    tensors: tuple[Tensor, ...]
    state: State

    def is_current(self, branches: Sequence[Branch]) -> bool:
        """Whether these are the branches, and nothing of them was replaced or changed in place."""
        if self.branches != tuple(branches) or not is_unchanged(self.held):
            return False
        return self.state == state_of(self.tensors)


class MergedCache:
    """Merged matrices of one sum by dtype; empty in copies and pickles, in no ``state_dict``."""

    def __init__(self) -> None:
        self._made: dict[tuple[torch.dtype, str], Watched] = {}

    @property
    def is_empty(self) -> bool:
        """Whether it keeps no matrices."""
        return all(watched.merged is None for watched in self._made.values())

    def drop(self) -> None:
        """Forget everything; what is asked for next is made anew."""
        self._made = {}

    def get(self, x: Tensor, branches: Sequence[Branch]) -> MergedSum | None:
        """For inputs like these; None if it cannot or need not be."""
        key = x.dtype, torch.get_float32_matmul_precision()
        watched = self._made.get(key)
        if watched is None or not watched.is_current(branches):
            self.drop()
            watched = self._made[key] = _watched(x, branches)
        return watched.merged

    def __deepcopy__(self, memo: dict[int, Any]) -> MergedCache:
        return MergedCache()

    def __reduce__(self) -> tuple[type[MergedCache], tuple[()]]:
        return MergedCache, ()


def merged_sum(
    x: Float[Tensor, "*tokens d_model"], branches: Sequence[Branch], cache: MergedCache
) -> Float[Tensor, "*tokens d_model"] | None:
    """``sum_b branch_b(x)`` in merged products; None if these branches, inputs or circumstances do not allow it.

    Where gradients are recorded it is None: biases and activations may have some. The branches' own modules are not
    called, so hooks on them do not run.
    """
    if is_traced() or torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype not in FLOATS:
        return None
    if x.numel() > MOST_EVER * x.shape[-1] or torch.is_autocast_enabled("cpu") or not takes_kernels(x, ()):
        return None
    merged = cache.get(x, branches)
    if merged is None or x.numel() > merged.most_tokens * x.shape[-1]:
        return None
    return _run(x.reshape(-1, x.shape[-1]), branches, merged).view(x.shape)


def _watched(x: Tensor, branches: Sequence[Branch]) -> Watched:
    """Merge, and remember what everything was made from."""
    places: list[Place] = []
    tensors: list[Tensor] = []
    for branch in branches:
        places += [(branch._modules, name) for name in ("up", "gate", "down", "selector")]
        for projection in _projections(branch):
            for named in (projection._parameters, projection._buffers, projection._modules):
                places += [(named, name) for name in named]
                tensors += [it for it in named.values() if isinstance(it, Tensor)]
    merged = _merge(branches, x.dtype) if takes_kernels(x, tensors) else None
    tracked = tuple(tensor for tensor in tensors if not tensor.is_inference())
    return Watched(merged, tuple(branches), held_at(places), tracked, state_of(tracked))


def _run(
    x: Float[Tensor, "tokens d_model"], branches: Sequence[Branch], merged: MergedSum
) -> Float[Tensor, "tokens d_model"]:
    outputs: dict[int, Tensor] = {}
    for product in merged.inner:
        outputs.update(zip(product.places, _split(product(x), product.sizes), strict=True))
    hidden = [
        _before_outer(branch.down, branch.hidden_of(*_inner_outputs(branch, outputs, 2 * index)))
        for index, branch in enumerate(branches)
    ]
    total: Tensor | None = None
    for product in merged.outer:
        inputs = [hidden[place] for place in product.places]
        out = product(inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1))
        total = out if total is None else total.add_(out)
    assert total is not None
    return total


def _split(found: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return (found,) if len(sizes) == 1 else torch.split(found, sizes, 1)


def _inner_outputs(branch: Branch, outputs: dict[int, Tensor], first: int) -> tuple[Tensor, Tensor | None]:
    """What `up` and `gate` give, once the second factors of low-rank ones are applied."""

    def whole(projection: Projection, place: int) -> Tensor:
        return linear(outputs[place], projection.a) if isinstance(projection, LowRank) else outputs[place]

    return whole(branch.up, first), None if branch.gate is None else whole(branch.gate, first + 1)


def _before_outer(down: Projection, hidden: Float[Tensor, "tokens neurons"]) -> Float[Tensor, "tokens columns"]:
    """What the merged matrix of all `down` is given of one branch."""
    if isinstance(down, LowRank):
        return linear(hidden, down.b)
    if isinstance(down, Packed) and cpu_int4.halves(down.spec.bits) == 2:
        return torch.cat([hidden, hidden], 1)
    return hidden


@torch.no_grad()
def _merge(branches: Sequence[Branch], dtype: torch.dtype) -> MergedSum | None:
    """The merged matrices; None if there is nothing to merge, or something that cannot be."""
    projections = [projection for branch in branches for projection in _projections(branch)]
    pays = len(branches) > 1 and dtype in HALF_PRECISION
    if not pays and not all(isinstance(projection, Packed) for projection in projections):
        return None
    weights = sum(projection.spec.shape[0] * projection.spec.shape[1] for projection in projections)
    mergeable = all(_is_mergeable(projection, dtype) for projection in projections)
    if not branches or not mergeable or weights < SMALLEST or any(branch.selector is not None for branch in branches):
        return None
    inner: list[tuple[int, Projection]] = []
    for index, branch in enumerate(branches):
        inner += [(2 * index, branch.up)] + ([] if branch.gate is None else [(2 * index + 1, branch.gate)])
    outer = [(index, branch.down) for index, branch in enumerate(branches)]
    return MergedSum(
        _products([(place, _first(projection)) for place, projection in inner], 0),
        _products([(place, _last(projection)) for place, projection in outer], 1),
        _most_tokens(projections),
    )


def _products(pieces: Sequence[tuple[int, Piece]], dim: int) -> tuple[Product, ...]:
    """One product for all float pieces, and one for all packed ones that fit below or beside each other."""
    kinds: dict[int, list[tuple[int, Piece]]] = {}
    for place, piece in pieces:
        kind = 0 if isinstance(piece, Tensor) else piece.halves if dim == 0 else 1
        kinds.setdefault(kind, []).append((place, piece))
    return tuple(_product([p for _, p in group], tuple(place for place, _ in group), dim) for group in kinds.values())


def _product(pieces: Sequence[Piece], places: tuple[int, ...], dim: int) -> Product:
    floats = [piece for piece in pieces if isinstance(piece, Tensor)]
    packed = [piece for piece in pieces if isinstance(piece, Int4Parts)]
    sizes = [(piece if isinstance(piece, Tensor) else piece.codes).shape[dim] for piece in pieces]
    matrix = torch.cat(floats, dim) if floats else int4_matrix(joined(packed, dim))
    return Product(matrix, sizes, places)


def _first(projection: Projection) -> Piece:
    """What multiplies the inputs of a projection."""
    return projection.b.detach() if isinstance(projection, LowRank) else _whole(projection)


def _last(projection: Projection) -> Piece:
    """What gives the outputs of a projection."""
    return projection.a.detach() if isinstance(projection, LowRank) else _whole(projection)


def _whole(projection: Projection) -> Piece:
    if isinstance(projection, Packed):
        return projection.stored().int4()
    assert isinstance(projection, Dense)
    return projection.weight.detach()


def _is_mergeable(projection: Projection, dtype: torch.dtype) -> bool:
    if isinstance(projection, Packed):
        spec = projection.spec
        fits = cpu_int4.fits(spec.shape, spec.group) and cpu_int4.is_precise_enough(dtype, spec.bits)
        return fits and projection.input_scale is None
    return type(projection) in (Dense, LowRank) and next(projection.parameters()).dtype == dtype


def _most_tokens(projections: Sequence[Projection]) -> int:
    """Up to how many tokens the int4 kernel is the faster way for every packed matrix, and merging for the others."""
    packed = [projection for projection in projections if isinstance(projection, Packed)]
    limits = [cpu_int4.most_tokens(projection.spec.bits) for projection in packed]
    return min(limits) if len(packed) == len(projections) else min([MOST_TOKENS, *limits])


def _projections(branch: Branch) -> list[Projection]:
    return [projection for projection in (branch.up, branch.gate, branch.down) if projection is not None]
