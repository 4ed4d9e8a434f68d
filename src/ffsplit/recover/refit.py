"""Stage ``refit``: the output maps of a compressed FFN solved for in closed form, both factors of low-rank ones too."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ffsplit.ffn.projections import Dense, LowRank, Projection
from ffsplit.ffn.sum import Branch, SumFFN
from ffsplit.ops.gram import add_gram
from ffsplit.ops.least_squares import reduced_rank_regression, refit_down
from ffsplit.ops.lowrank import svd_factors
from ffsplit.recover.layers import Layer

ROUNDS = 3
RIDGE = 1e-6
_PIECE = 1 << 12


@dataclass
class _Part:
    """One output map: a matrix of a projection, or the bias.

    Attributes:
        columns: its place among all features.
        weight: the matrix as solved so far, ``[d_model, columns]``, float64.
        projection: where it goes; None for the bias.
        branch: whose hidden activations it reads; None for the input itself, or the bias.
    """

    columns: slice
    weight: Float[Tensor, "d_model columns"]
    projection: Projection | None
    branch: Branch | None


def refit_layer(layer: Layer) -> dict[str, Any] | None:
    """Alternate over the output maps: each takes what the others leave of the dense original's outputs.

    Dense maps and the bias are solved for together by least squares, a low-rank map, with both its factors, by
    reduced-rank regression; maps in other storages keep their numbers. What does not lower the held-out error is put
    back.

    Reference: Izenman, Reduced-rank regression for the multivariate linear model, 1975, for one low-rank map.
    """
    started = time.perf_counter()
    parts = _parts(layer.module)
    if not parts or layer.module.skip is not None:
        return None
    before = layer.error()
    kept = {name: tensor.clone() for name, tensor in layer.module.state_dict().items()}
    gram, cross = _sums(layer, parts)
    for _ in range(ROUNDS if len(parts) > 1 else 1):
        _one_round(parts, gram, cross)
    _write(layer.module, parts)
    after = layer.error()
    if not after < before:
        layer.module.load_state_dict(kept)
        after = before
    seconds = round(time.perf_counter() - started, 3)
    return {"ffn": layer.name, "held_out_loss_before": before, "held_out_loss": after, "steps": 1, "seconds": seconds}


def _parts(module: SumFFN) -> list[_Part]:
    """The output maps that can be solved for, the low-rank ones first: the dense ones then absorb their errors."""
    maps: list[tuple[Projection | None, Branch | None]] = [
        (branch.down, branch) for branch in module.branches if isinstance(branch, Branch)
    ]
    maps += [(module.linear, None)] if module.linear is not None else []
    free = [(projection, branch) for projection, branch in maps if isinstance(projection, Dense | LowRank)]
    free.sort(key=lambda pair: isinstance(pair[0], Dense))
    parts, start = [], 0
    for projection, branch in free:
        assert projection is not None
        width = projection.spec.shape[1]
        parts.append(_Part(slice(start, start + width), projection.dense().double(), projection, branch))
        start += width
    if module.bias is not None and parts:
        parts.append(_Part(slice(start, start + 1), module.bias.detach().double()[:, None], None, None))
    return parts


@torch.no_grad()
def _sums(layer: Layer, parts: list[_Part]) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n d_model"]]:
    """Gram of all features, and their products with what the fixed maps leave of the original's outputs."""
    size = parts[-1].columns.stop
    device = layer.inputs.device
    gram = torch.zeros(size, size, dtype=torch.float64, device=device)
    cross = torch.zeros(size, layer.module.d_model, dtype=torch.float64, device=device)
    weight = torch.cat([part.weight for part in parts], dim=1)
    for rows in torch.split(layer.inputs, _PIECE):  # type: ignore[no-untyped-call]
        x = rows.to(layer.dtype)
        features = torch.cat([_features(part, x) for part in parts], dim=-1).double()
        # What the free maps give now is taken out of the sum, so that what remains is the fixed ones' share.
        fixed = layer.module(x).double() - features @ weight.T
        add_gram(gram, features)
        cross += features.T @ (layer.wanted(rows).double() - fixed)
    return gram, cross


def _features(part: _Part, x: Tensor) -> Tensor:
    if part.branch is not None:
        return part.branch.hidden(x)
    return x if part.projection is not None else x.new_ones(*x.shape[:-1], 1)


def _one_round(parts: list[_Part], gram: Tensor, cross: Tensor) -> None:
    """Every low-rank map once, then all others together."""
    for part in parts:
        if isinstance(part.projection, LowRank):
            left = _left_for([part], parts, gram, cross)
            own = gram[part.columns, part.columns]
            a, b = reduced_rank_regression(own, left, part.projection.spec.rank, RIDGE)
            part.weight = a @ b
    full = [part for part in parts if not isinstance(part.projection, LowRank)]
    if full:
        places = torch.cat([torch.arange(p.columns.start, p.columns.stop, device=gram.device) for p in full])
        prior = torch.cat([part.weight for part in full], dim=1)
        left = _left_for(full, parts, gram, cross)
        solved = refit_down(gram[places][:, places], left, RIDGE, prior)
        pieces = torch.split(solved, [part.weight.shape[1] for part in full], dim=1)  # type: ignore[no-untyped-call]
        for part, weight in zip(full, pieces, strict=True):
            part.weight = weight


def _left_for(chosen: list[_Part], parts: list[_Part], gram: Tensor, cross: Tensor) -> Tensor:
    """Products of the chosen maps' features with what the other maps leave."""
    rows = torch.cat([torch.arange(p.columns.start, p.columns.stop, device=gram.device) for p in chosen])
    left = cross[rows].clone()
    for part in parts:
        if not any(part is one for one in chosen):
            left -= gram[rows][:, part.columns] @ part.weight.T
    return left


@torch.no_grad()
def _write(module: SumFFN, parts: list[_Part]) -> None:
    for part in parts:
        if part.projection is None:
            assert module.bias is not None
            module.bias.copy_(part.weight[:, 0])
        elif isinstance(part.projection, LowRank):
            a, b = svd_factors(part.weight, part.projection.spec.rank)
            part.projection.a.copy_(a)
            part.projection.b.copy_(b)
        else:
            weight: nn.Parameter = part.projection.weight  # type: ignore[assignment]
            weight.copy_(part.weight)
