"""All branches of a sum in few products, where every product costs something whatever its size.

Matrices that are given the same inputs stand below each other in one matrix: the ``up`` and ``gate`` of all branches,
of low-rank ones their first factors. Matrices whose outputs are added stand beside each other: the ``down`` of all
branches, of low-rank ones their last factors. Float matrices are merged with float ones, packed ones with packed ones:
for few tokens as codes (as far as the CPU's int4 kernel takes them), for many decoded.

The merged matrices are copies. Packed ones take the place of those that the kernel would need anyway. Float ones cost
memory: of a heavy dense and a low-rank branch, all but the factors that are neither first nor last. On CPUs they are
made where they were measured to pay: in half precision, and for few tokens. On GPUs, where nine products of a few
microseconds each take their turns, they are made for any number of tokens, as far as there is room for decoded
matrices.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from ffsplit.ffn.places import Held, Place, held_at, is_unchanged
from ffsplit.ffn.projections import Dense, LowRank, Packed, Projection
from ffsplit.kernels import cpu, cpu_int4
from ffsplit.kernels.cache import State, counted, decoded_room, is_capturing, state_of
from ffsplit.kernels.cpu_int4 import Int4Matrix, Int4Parts, int4_linear, int4_matrix, joined
from ffsplit.kernels.dispatch import FLOATS, SMALLEST, is_traced, may_round, takes_kernels

if TYPE_CHECKING:
    from ffsplit.ffn.sum import Branch

MOST_TOKENS = 128 if cpu.TILES else 4
"""Up to how many tokens merging float matrices is worth their copies: the faster products are, the more."""
MOST_EVER = max(MOST_TOKENS, *cpu_int4.MOST_TOKENS.values())
HALF_PRECISION = (torch.bfloat16, torch.float16)
Piece = Tensor | Int4Parts
Kind = tuple[torch.dtype, str, bool]


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

    matrix: Tensor | Int4Matrix
    sizes: list[int]
    places: tuple[int, ...]

    def __call__(self, x: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens rows"]:
        if not isinstance(self.matrix, Tensor):
            return int4_linear(x, self.matrix)
        return linear(x.to(self.matrix.dtype), self.matrix).to(x.dtype)


@dataclass(frozen=True)
class MergedSum:
    """The products of a sum.

    Attributes:
        inner: of its inputs.
        outer: of its hidden activations.
        most_tokens: for how many these are worth it.
        decoded: whether packed matrices are in there decoded.
    """

    inner: tuple[Product, ...]
    outer: tuple[Product, ...]
    most_tokens: int
    decoded: bool


@dataclass(frozen=True)
class Watched:
    """What a merged sum (or the answer that there is none) was made from, to be looked at before every use.

    Attributes:
        kind: what else than branches it depends on.
        merged: None if the branches cannot be merged.
        branches: these.
        held: what stood where in them.
        tensors: among these.
        state: version and address of each tensor.
    """

    kind: Kind
    merged: MergedSum | None
    branches: tuple[Branch, ...]
    held: tuple[Held, ...]
    tensors: tuple[Tensor, ...]
    state: State

    def is_current(self, kind: Kind, branches: Sequence[Branch]) -> bool:
        """Whether it is for these, and nothing of the branches was replaced or changed in place."""
        if self.kind != kind or self.branches != tuple(branches) or not is_unchanged(self.held):
            return False
        return self.state == state_of(self.tensors)


class MergedCache:
    """Merged matrices of one sum, for few tokens and for many; empty in copies and pickles, in no ``state_dict``."""

    def __init__(self) -> None:
        self._made: dict[bool, Watched] = {}

    @property
    def is_empty(self) -> bool:
        """Whether it keeps no matrices."""
        return all(watched.merged is None for watched in self._made.values())

    def drop(self) -> None:
        """Forget everything; what is asked for next is made anew."""
        self._made = {}

    def get(self, x: Tensor, branches: Sequence[Branch], *, decoded: bool = False) -> MergedSum | None:
        """For inputs like these, packed matrices decoded or not; None if it cannot or need not be."""
        kind = x.dtype, cpu.float32_precision(), may_round()
        watched = self._made.get(decoded)
        if watched is not None and watched.is_current(kind, branches):
            return watched.merged
        # More tokens have no use for codes, and what is made during a capture would be there in replays only.
        too_many = not decoded and x.numel() > most_tokens(branches, x.device) * x.shape[-1]
        if too_many or is_capturing(x.device):
            return None
        if not all(other.is_current(kind, branches) for other in self._made.values()):
            self.drop()
        del watched  # its memory is needed
        try:
            made = _watched(x, branches, kind, decoded)
        except NoRoom:  # there may be some next time
            return None
        self._made[decoded] = made
        return made.merged

    def __deepcopy__(self, memo: dict[int, Any]) -> MergedCache:
        return MergedCache()

    def __reduce__(self) -> tuple[type[MergedCache], tuple[()]]:
        return MergedCache, ()


def merged_sum(
    x: Float[Tensor, "*tokens d_model"], branches: Sequence[Branch], cache: MergedCache
) -> Float[Tensor, "*tokens d_model"] | None:
    """``sum_b branch_b(x)`` in merged products; None if these branches, inputs or circumstances do not allow it.

    Where gradients are recorded it is None: biases and activations may have some. The branches' own modules are not
    called, so hooks on them do not run; for many tokens, and for any number on GPUs, a sum with hooks inside is left as
    it is.
    """
    device = x.device.type
    if not branches or is_traced() or torch.is_grad_enabled() or device not in ("cpu", "cuda") or x.dtype not in FLOATS:
        return None
    if torch.is_autocast_enabled(device) or not takes_kernels(x, ()):
        return None
    tokens = x.numel() // x.shape[-1]
    # Many tokens pass through models whose insides are looked at, few through models that are used.
    if device == "cuda":
        merged = None if _have_hooks(branches) else cache.get(x, branches)
    else:
        merged = cache.get(x, branches) if tokens <= MOST_EVER else None
        if merged is None or tokens > merged.most_tokens:
            separate = tokens <= _most_as_codes(branches, x.dtype) or _have_hooks(branches)
            merged = None if separate else cache.get(x, branches, decoded=True)
    return None if merged is None else _run(x.reshape(-1, x.shape[-1]), branches, merged).view(x.shape)


def _have_hooks(branches: Sequence[Branch]) -> bool:
    hooked = nn.modules.module
    return bool(hooked._global_forward_hooks or hooked._global_forward_pre_hooks) or any(
        module is not None and (module._forward_hooks or module._forward_pre_hooks)
        for branch in branches
        for module in (branch, *branch._modules.values())
    )


def _most_as_codes(branches: Sequence[Branch], dtype: torch.dtype) -> int:
    """Up to how many tokens some branch of its own takes the int4 kernel."""
    packed = [it for branch in branches for it in _projections(branch) if isinstance(it, Packed)]
    return max((cpu_int4.most_tokens(it.spec.bits) for it in packed if _fits_int4(it, dtype)), default=0)


def _watched(x: Tensor, branches: Sequence[Branch], kind: Kind, decoded: bool) -> Watched:
    """Merge, and remember what everything was made from.

    Raises:
        NoRoom: there is none for what would be kept.
    """
    places: list[Place] = []
    tensors: list[Tensor] = []
    for branch in branches:
        places += [(branch._modules, name) for name in ("up", "gate", "down", "selector")]
        for projection in _projections(branch):
            for named in (projection._parameters, projection._buffers, projection._modules):
                places += [(named, name) for name in named]
                tensors += [it for it in named.values() if isinstance(it, Tensor)]
    made = _merge_decoded if decoded else _merge
    merged = made(branches, x.dtype, x.device) if takes_kernels(x, tensors) else None
    if decoded and merged is not None:
        for branch in branches:
            for projection in _projections(branch):
                if isinstance(projection, Packed):  # nothing is kept twice
                    projection.derived.drop()
    tracked = tuple(tensor for tensor in tensors if not tensor.is_inference())
    return Watched(kind, merged, tuple(branches), held_at(places), tracked, state_of(tracked))


def _run(
    x: Float[Tensor, "tokens d_model"], branches: Sequence[Branch], merged: MergedSum
) -> Float[Tensor, "tokens d_model"]:
    outputs: dict[int, Tensor] = {}
    for product in merged.inner:
        outputs.update(zip(product.places, _split(product(x), product.sizes), strict=True))
    hidden = [
        _before_outer(branch.down, merged.decoded, branch.hidden_of(*_inner_outputs(branch, outputs, 2 * index)))
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


def _before_outer(
    down: Projection, decoded: bool, hidden: Float[Tensor, "tokens neurons"]
) -> Float[Tensor, "tokens columns"]:
    """What the merged matrix of all `down` is given of one branch."""
    if isinstance(down, LowRank):
        return linear(hidden, down.b)
    if isinstance(down, Packed) and not decoded and cpu_int4.halves(down.spec.bits) == 2:
        return torch.cat([hidden, hidden], 1)
    return hidden


@torch.no_grad()
def _merge(branches: Sequence[Branch], dtype: torch.dtype, device: torch.device) -> MergedSum | None:
    """The merged matrices; None if there is nothing to merge, or something that cannot be."""
    projections = [projection for branch in branches for projection in _projections(branch)]
    on_cpu = device.type == "cpu"
    pays = len(branches) > 1 and (dtype in HALF_PRECISION or not on_cpu)
    if not pays and not all(isinstance(projection, Packed) for projection in projections):
        return None
    mergeable = all(_is_mergeable(projection, dtype, on_cpu) for projection in projections)
    if not mergeable or any(branch.selector is not None for branch in branches):
        return None
    if sum(projection.spec.shape[0] * projection.spec.shape[1] for projection in projections) < SMALLEST:
        return None
    inner, outer = _placed(branches)
    pieces = [(place, _first(it)) for place, it in inner], [(place, _last(it)) for place, it in outer]
    copied = sum(piece.nbytes for _, piece in (*pieces[0], *pieces[1]) if isinstance(piece, Tensor))
    if not on_cpu and copied > decoded_room(device):
        raise NoRoom
    inner_products, outer_products = (_products(pieces[dim], dim, count=not on_cpu) for dim in (0, 1))
    return MergedSum(inner_products, outer_products, most_tokens(branches, device), decoded=False)


@torch.no_grad()
def _merge_decoded(branches: Sequence[Branch], dtype: torch.dtype, device: torch.device) -> MergedSum | None:
    """The matrices of packed (and dense) branches, each decoded into the dtype in which it is multiplied fastest."""
    projections = [projection for branch in branches for projection in _projections(branch)]
    known = all(type(it) is Packed or (type(it) is Dense and it.weight.dtype == dtype) for it in projections)
    several = len(projections) > 2 and any(type(it) is Packed for it in projections)
    if not known or not several or any(branch.selector is not None for branch in branches):
        return None
    sizes = [projection.spec.shape[0] * projection.spec.shape[1] for projection in projections]
    if max(sizes) < SMALLEST:
        return None
    wanted = {it: _product_dtype(it, dtype, device) for it in projections}
    if sum(size * wanted[it].itemsize for size, it in zip(sizes, projections, strict=True)) > decoded_room(device):
        raise NoRoom

    def products(placed: Sequence[tuple[int, Projection]], dim: int) -> tuple[Product, ...]:
        pieces = [
            (place, it.stored().dense(wanted[it]) if isinstance(it, Packed) else _whole(it)) for place, it in placed
        ]
        return _products(pieces, dim, count=True)

    inner, outer = _placed(branches)
    return MergedSum(products(inner, 0), products(outer, 1), sys.maxsize, decoded=True)


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


def _products(pieces: Sequence[tuple[int, Piece]], dim: int, *, count: bool) -> tuple[Product, ...]:
    """One product for all float pieces of a dtype, and one for all packed ones that fit below or beside each other."""
    kinds: dict[torch.dtype | int, list[tuple[int, Piece]]] = {}
    for place, piece in pieces:
        kind = piece.dtype if isinstance(piece, Tensor) else piece.halves if dim == 0 else 1
        kinds.setdefault(kind, []).append((place, piece))
    groups = (([piece for _, piece in group], tuple(place for place, _ in group)) for group in kinds.values())
    return tuple(_product(*group, dim, count) for group in groups)


def _product(pieces: Sequence[Piece], places: tuple[int, ...], dim: int, count: bool) -> Product:
    floats = [piece for piece in pieces if isinstance(piece, Tensor)]
    packed = [piece for piece in pieces if isinstance(piece, Int4Parts)]
    sizes = [(piece if isinstance(piece, Tensor) else piece.codes).shape[dim] for piece in pieces]
    if not floats:
        return Product(int4_matrix(joined(packed, dim)), sizes, places)
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
    assert isinstance(projection, Dense)
    return projection.weight.detach()


def _is_mergeable(projection: Projection, dtype: torch.dtype, on_cpu: bool) -> bool:
    if isinstance(projection, Packed):
        return on_cpu and _fits_int4(projection, dtype) and projection.input_scale is None
    return type(projection) in (Dense, LowRank) and next(projection.parameters()).dtype == dtype


def _fits_int4(projection: Packed, dtype: torch.dtype) -> bool:
    spec = projection.spec
    return cpu_int4.fits(spec.shape, spec.group) and cpu_int4.is_precise_enough(dtype, spec.bits)


def most_tokens(branches: Sequence[Branch], device: torch.device) -> int:
    """Up to how many tokens the int4 kernel is the faster way for every packed matrix, and merging for the others."""
    if device.type != "cpu":
        return sys.maxsize
    projections = [projection for branch in branches for projection in _projections(branch)]
    packed = [projection for projection in projections if isinstance(projection, Packed)]
    limits = [cpu_int4.most_tokens(projection.spec.bits) for projection in packed]
    return min(limits) if len(packed) == len(projections) else min([MOST_TOKENS, *limits])


def _projections(branch: Branch) -> list[Projection]:
    return [projection for projection in (branch.up, branch.gate, branch.down) if projection is not None]
