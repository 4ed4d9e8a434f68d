"""The FFN that a group of layers shares, made wider by the neurons that it reproduces worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ffsplit.calibrate.layer import LayerData, RefitSums
from ffsplit.ffn.sum import SumFFN, dense_branch
from ffsplit.ffn.weights import FFNWeights, side_by_side
from ffsplit.methods.matched import Match, in_order_of
from ffsplit.ops.least_squares import centred, refit_down
from ffsplit.ops.matching import unexplained_energy


@dataclass(frozen=True)
class UsedAt:
    """A layer that the shared FFN is used in.

    Attributes:
        data: the layer's dense FFN and its inputs.
        ffn: the same function, its neurons in the order of those that it shares.
    """

    data: LayerData
    ffn: FFNWeights


def place_of(base: FFNWeights, data: LayerData, match: Match) -> UsedAt:
    """A member of the group beside the FFN that it will use."""
    return UsedAt(data, in_order_of(base, data.ffn, match, data, with_down=True))


def wider(base: FFNWeights, members: Sequence[UsedAt], extra: int) -> FFNWeights:
    """``base`` and, behind its neurons, the ``extra`` neurons of the members that lose the most without them.

    A neuron loses the energy of its output that no multiple of its counterpart's activations gives, on the inputs of
    its own layer. The columns of `down` behind the appended neurons are zero.

    Args:
        base: the FFN that is shared so far.
        members: of the group, without the layer that ``base`` comes from.
        extra: neurons to append, at most all that the members have.
    """
    lost = torch.cat([_lost(base, member) for member in members])
    worst = lost.argsort(descending=True, stable=True)[:extra]
    every = side_by_side([member.ffn for member in members])
    return padded(base, every.take(worst.sort().values))


def padded(ffn: FFNWeights, extra: FFNWeights) -> FFNWeights:
    """The same function with further neurons that nothing listens to."""
    silent = replace(extra, down=torch.zeros_like(extra.down), down_bias=None)
    wide = side_by_side([replace(ffn, down_bias=None), silent])
    return replace(wide, down_bias=ffn.down_bias)


def after(ffn: FFNWeights, width: int) -> FFNWeights:
    """The neurons behind the first ``width``."""
    return ffn.take(_behind(ffn, width))


def _behind(ffn: FFNWeights, width: int) -> Int[Tensor, " neurons"]:
    return torch.arange(width, ffn.d_ff, device=ffn.up.device)


@torch.no_grad()
def _lost(base: FFNWeights, member: UsedAt) -> Float[Tensor, " d_ff"]:
    """What is lost of each of a layer's neurons when its counterpart works in its place."""
    mine, theirs, cross = (torch.zeros(base.d_ff, dtype=torch.float64, device=base.up.device) for _ in range(3))
    for x in member.data.chunks():
        own, other = member.ffn.hidden(x).double(), base.hidden(x).double()
        mine += own.square().sum(0)
        theirs += other.square().sum(0)
        cross += (own * other).sum(0)
    return unexplained_energy(mine, theirs, cross) * member.ffn.down.double().square().sum(0)


def fit_wide(wide: FFNWeights, places: Sequence[UsedAt], ridge: float) -> SumFFN:
    """The shared FFN with the `down` that serves all its places best: their normal equations are added up.

    Every place has a bias of its own where the FFNs have one; the one that is stored here is that of the first.

    Args:
        wide: the inner projections, and where the ridge pulls `down` to.
        places: where the same `down` is used, the layer that stores it first.
        ridge: relative to the mean diagonal of the Gram of all.
    """
    bias = wide.down_bias is not None
    sums = [_sums(wide, place, bias) for place in places]
    gram, cross = (sum(terms[1:], terms[0]) for terms in zip(*(_deviations(one, bias) for one in sums), strict=True))
    down = refit_down(gram, cross, ridge, wide.down)
    first = sums[0]
    shift = (first.cross[0] - down @ first.gram[0, 1:]) / first.gram[0, 0] if bias else None
    fitted = replace(wide, down=down.to(wide.down))
    stored = None if shift is None or wide.down_bias is None else (wide.down_bias + shift).to(wide.down)
    return SumFFN(wide.d_model, [dense_branch(fitted)], bias=stored)


def _sums(wide: FFNWeights, place: UsedAt, bias: bool) -> RefitSums:
    """Sums over [1 | hidden] of one place: the shared weights with the biases of the place's own neurons."""
    own = padded(place.ffn, after(wide, place.ffn.d_ff))
    used = replace(own, up=wide.up, gate=wide.gate)

    @torch.no_grad()
    def hidden(x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens hidden"]:
        h = used.hidden(x)
        return torch.cat([x.new_ones(len(x), 1), h], dim=1) if bias else h

    return place.data.refit_sums(hidden)


def _deviations(sums: RefitSums, bias: bool) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n d_model"]]:
    """Gram and products once the place's bias has taken the means."""
    if not bias:
        return sums.gram, sums.cross
    count = int(sums.gram[0, 0])
    return centred(sums.gram[1:, 1:], sums.cross[1:], sums.gram[0, 1:], sums.cross[0], count)
