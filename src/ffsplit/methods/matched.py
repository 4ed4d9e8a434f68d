"""Two FFNs neuron by neuron: the neurons of one in the order of the other's, and the mean of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.weights import FFNWeights
from ffsplit.ops import scores
from ffsplit.ops.matching import best_assignment, correlation

Match = Literal["activations", "weights", "none"]


def in_order_of(owner: FFNWeights, ffn: FFNWeights, how: Match, data: LayerData, *, with_down: bool) -> FFNWeights:
    """The same function as ``ffn``, its neurons in the order of the owner's neurons that they resemble most.

    In a gated FFN the sign of a neuron's `up` and `down` may be turned without changing the function, so that there a
    neuron may also match the negative of another.

    Args:
        owner: of the same shape.
        ffn: whose neurons are reordered.
        how: by the correlation of the hidden activations of both on ``data.inputs``, by the inner products of the
            weights (the nearest permutation in the Frobenius norm), or not at all.
        data: the FFN that is being fitted.
        with_down: whether `down` counts when weights are compared.
    """
    if how == "none":
        return ffn
    if how == "weights":
        fixed, turned = _weight_similarity(owner, ffn, with_down)
    else:
        turned = _hidden_correlation(owner, ffn, data)
        fixed = torch.zeros_like(turned)
    partner = best_assignment(fixed + (turned.abs() if ffn.gated else turned))
    ordered = ffn.take(partner)
    if not ffn.gated:
        return ordered
    rows = torch.arange(len(partner), device=partner.device)
    sign = torch.where(turned[rows, partner] < 0, -1.0, 1.0).to(ffn.up)
    return replace(
        ordered,
        up=ordered.up * sign[:, None],
        down=ordered.down * sign,
        up_bias=None if ordered.up_bias is None else ordered.up_bias * sign,
    )


def _weight_similarity(
    owner: FFNWeights, ffn: FFNWeights, with_down: bool
) -> tuple[Float[Tensor, "d_ff d_ff"], Float[Tensor, "d_ff d_ff"]]:
    """Inner products of the neurons' weights: the part whose sign is fixed, and the one that may be turned."""
    turned = owner.up.double() @ ffn.up.double().T
    if with_down:
        turned = turned + owner.down.double().T @ ffn.down.double()
    if owner.gate is None or ffn.gate is None:
        return torch.zeros_like(turned), turned
    return owner.gate.double() @ ffn.gate.double().T, turned


@torch.no_grad()
def _hidden_correlation(owner: FFNWeights, ffn: FFNWeights, data: LayerData) -> Float[Tensor, "d_ff d_ff"]:
    """Correlation of the hidden activations of two FFNs that are given the same inputs."""
    cross = torch.zeros(owner.d_ff, ffn.d_ff, dtype=torch.float64, device=ffn.up.device)
    sums = [torch.zeros(owner.d_ff, dtype=torch.float64, device=ffn.up.device) for _ in range(4)]
    for x in data.chunks():
        theirs, mine = owner.hidden(x).double(), ffn.hidden(x).double()
        cross.addmm_(theirs.T, mine)
        for total, part in zip(sums, (theirs, theirs.square(), mine, mine.square()), strict=True):
            total += part.sum(0)
    return correlation(cross, (sums[0], sums[1]), (sums[2], sums[3]), max(data.inputs.tokens, 1))


def mean_of(ffns: Sequence[FFNWeights], data: LayerData, *, by_text: bool) -> FFNWeights:
    """The mean of matched FFNs, neuron by neuron, each weighted by the energy of its output.

    Args:
        ffns: in one order of neurons; biases are those of the first.
        data: the energies are those on its inputs.
        by_text: False weights by the squared norms of the weights instead.
    """
    energies = torch.stack([_energy(ffn, data, by_text) for ffn in ffns])
    total = energies.sum(0)
    shares = torch.where(total > 0, energies / torch.where(total > 0, total, 1.0), 1.0 / len(ffns)).to(ffns[0].up)
    first = ffns[0]

    def mean(tensors: Sequence[Tensor], rows: bool) -> Tensor:
        weighted = (t * (share[:, None] if rows else share) for t, share in zip(tensors, shares, strict=True))
        return torch.stack(list(weighted)).sum(0)

    gates = [ffn.gate for ffn in ffns if ffn.gate is not None]
    return replace(
        first,
        up=mean([ffn.up for ffn in ffns], rows=True),
        down=mean([ffn.down for ffn in ffns], rows=False),
        gate=mean(gates, rows=True) if gates else None,
    )


@torch.no_grad()
def _energy(ffn: FFNWeights, data: LayerData, by_text: bool) -> Float[Tensor, " d_ff"]:
    if not by_text:
        return scores.magnitude(ffn.up, ffn.gate, ffn.down).square()
    square = torch.zeros(ffn.d_ff, dtype=torch.float64, device=ffn.up.device)
    for x in data.chunks():
        square += ffn.hidden(x).double().square().sum(0)
    return scores.output_norm(square, ffn.down).square()
