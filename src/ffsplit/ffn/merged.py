"""All branches of a sum in few products, where every product costs something whatever its size.

:mod:`ffsplit.ffn.merging` says which matrices become one and makes them; here they are kept, looked after and run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ffsplit.ffn.hooks import have_hooks
from ffsplit.ffn.merging import (
    MOST_EVER,
    Between,
    MergedSum,
    NoRoom,
    Product,
    fits_int4,
    merge,
    merge_decoded,
    most_tokens,
    projections_of,
)
from ffsplit.ffn.places import Held, Place
from ffsplit.ffn.projections import Int8Dynamic, Packed
from ffsplit.kernels import cpu, cpu_int4
from ffsplit.kernels.cache import State, is_capturing, state_of
from ffsplit.kernels.dispatch import FLOATS, may_round, takes_kernels
from ffsplit.kernels.int8 import FEW_KEY

if TYPE_CHECKING:
    from ffsplit.ffn.sum import Branch

Kind = tuple[torch.dtype, str, bool]
HOOKS_FROM = 24
"""Tokens above which hooks inside a sum stop merging; up to here looking for them would show."""


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
    held: Held
    tensors: tuple[Tensor, ...]
    state: State

    def is_current(self, kind: Kind, branches: Sequence[Branch]) -> bool:
        """Whether it is for these, and nothing of the branches was replaced or changed in place."""
        if self.kind != kind or self.branches != tuple(branches) or not self.held.is_unchanged():
            return False
        return self.state == state_of(self.tensors)


class MergedCache:
    """Merged matrices of one sum, for few tokens and for many; empty in copies and pickles, in no ``state_dict``."""

    def __init__(self) -> None:
        self._made: dict[bool, Watched] = {}

    @property
    def keeps_decoded(self) -> bool:
        """Whether it keeps packed matrices decoded."""
        watched = self._made.get(True)
        return watched is not None and watched.merged is not None

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
    if not branches or torch.is_grad_enabled() or not (x.is_cpu or x.is_cuda) or x.dtype not in FLOATS:
        return None
    if not takes_kernels(x, ()) or torch.is_autocast_enabled("cpu" if x.is_cpu else "cuda"):
        return None
    tokens = x.numel() // x.shape[-1]
    # Many tokens pass through models whose insides are looked at, few through models that are used.
    if x.is_cuda:
        merged = None if _have_hooks(branches) else cache.get(x, branches)
    else:
        seen = tokens > HOOKS_FROM and _have_hooks(branches)
        merged = cache.get(x, branches) if tokens <= MOST_EVER and not seen else None
        if merged is None or tokens > merged.most_tokens:
            separate = seen or tokens <= _most_as_codes(branches, x.dtype)
            separate = separate or (tokens <= HOOKS_FROM and _have_hooks(branches))
            merged = None if separate else cache.get(x, branches, decoded=True)
    if merged is None:
        return None
    # No call that would change nothing: for one token each of them shows.
    return _run(x, merged) if x.ndim == 2 else _run(x.reshape(-1, x.shape[-1]), merged).view(x.shape)


def _have_hooks(branches: Sequence[Branch]) -> bool:
    return have_hooks(module for branch in branches for module in (branch, *branch._modules.values()))


def _most_as_codes(branches: Sequence[Branch], dtype: torch.dtype) -> int:
    """Up to how many tokens some branch of its own takes the int4 kernel."""
    packed = [it for it in projections_of(branches) if isinstance(it, Packed)]
    return max((cpu_int4.most_tokens(it.spec.bits) for it in packed if fits_int4(it, dtype)), default=0)


def _watched(x: Tensor, branches: Sequence[Branch], kind: Kind, decoded: bool) -> Watched:
    """Merge, and remember what everything was made from.

    Raises:
        NoRoom: there is none for what would be kept.
    """
    places: list[Place] = []
    tensors: list[Tensor] = []
    for branch in branches:
        places += [(branch._modules, name) for name in ("act", "up", "gate", "down", "selector")]
        places += [(branch._parameters, name) for name in ("up_bias", "gate_bias")]
    for projection in projections_of(branches):
        for named in (projection._parameters, projection._buffers, projection._modules):
            places += [(named, name) for name in named]
            tensors += [it for it in named.values() if isinstance(it, Tensor)]
    made = merge_decoded if decoded else merge
    merged = made(branches, x.dtype, x.device) if takes_kernels(x, tensors) else None
    for projection in projections_of(branches) if merged is not None else ():  # nothing is kept twice
        if isinstance(projection, Int8Dynamic):
            projection.derived.forget(FEW_KEY)  # many tokens keep theirs
        elif decoded and isinstance(projection, Packed):
            projection.derived.drop()
    tracked = tuple(tensor for tensor in tensors if not tensor.is_inference())
    return Watched(kind, merged, tuple(branches), Held.at(places), tracked, state_of(tracked))


def _run(x: Float[Tensor, "tokens d_model"], merged: MergedSum) -> Float[Tensor, "tokens d_model"]:
    outputs: dict[int, Tensor] = {}
    for product in merged.inner:
        outputs.update(zip(product.places, _split(product(x), product.sizes), strict=True))
    total: Tensor | None = None
    for product in merged.outer:
        out = product(_inputs(product, merged.between, outputs))
        total = out if total is None else total.add_(out)
    assert total is not None
    return total


def _inputs(
    product: Product, between: Sequence[Between], outputs: dict[int, Tensor]
) -> Float[Tensor, "tokens columns"]:
    """What a product of ``down`` matrices is given, side by side."""
    first = outputs[2 * product.places[0]]
    if len(product.places) == 1 or not first.is_cuda:
        parts = [between[at](outputs[2 * at], outputs.get(2 * at + 1)) for at in product.places]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    # Written where they belong: at thousands of tokens a copy shows.
    found = first.new_empty(first.shape[0], sum(product.sizes))
    for at, part in zip(product.places, found.split_with_sizes(product.sizes, 1), strict=True):
        between[at](outputs[2 * at], outputs.get(2 * at + 1), out=part)
    return found


def _split(found: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return (found,) if len(sizes) == 1 else found.split_with_sizes(sizes, 1)
