"""A compressed FFN as modules for the tracer, with one node where many projections read the same input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ffsplit.export.nodes import Node
from ffsplit.export.storages import written
from ffsplit.ffn.projections import Projection
from ffsplit.ffn.sum import Branch, SumFFN


def exportable(ffn: SumFFN) -> nn.Module:
    """The same function in float32, its projections written as nodes. ``ffn`` must not be used any more.

    Raises:
        ModelError: a storage has no ONNX form.
    """
    ffn.float().requires_grad_(False)
    branches = [branch for branch in ffn.branches if isinstance(branch, Branch)]
    plain = ffn.skip is None and ffn.lookup is None and all(branch.selector is None for branch in branches)
    if plain and branches:
        return MergedSum(branches, ffn.linear, ffn.bias)
    for branch in branches:
        for name in ("up", "gate", "down"):
            if isinstance(projection := getattr(branch, name), Projection):
                setattr(branch, name, written(projection).module())
    if ffn.linear is not None:
        ffn.linear = written(ffn.linear).module()  # type: ignore[assignment]
    return ffn


class MergedSum(nn.Module):
    """``sum_b branch_b(x) + linear(x) + bias``, where all that read ``x`` in the same way share one matrix product.

    At one token a node costs about as much to start as a small projection takes, and ONNX Runtime rounds ``x`` anew
    for every node of packed codes.
    """

    def __init__(self, branches: Sequence[Branch], linear: Projection | None, bias: Tensor | None) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(_Hidden(branch) for branch in branches)
        self.down = nn.ModuleList(written(branch.down).module() for branch in branches)
        inner = [p for branch in branches for p in (branch.up, branch.gate) if p is not None]
        self.reader = _Reader([*inner, *([] if linear is None else [linear])])
        self.linear = linear is not None
        self.register_buffer("bias", bias)

    def forward(self, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens d_model"]:
        read = iter(self.reader(x))
        terms = []
        for hidden, down in zip(self.hidden, self.down, strict=True):
            terms.append(down(hidden(next(read), next(read) if hidden.gated else None)))
        if self.linear:
            terms.append(next(read))
        if self.bias is not None:
            terms.append(self.bias)
        total: Tensor = terms[0]
        for term in terms[1:]:
            total = total + term
        return total


class _Hidden(nn.Module):
    """Hidden activations of a branch from what its inner projections gave."""

    up_bias: Tensor | None
    gate_bias: Tensor | None

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.act = branch.act
        self.gated = branch.gate is not None
        self.register_buffer("up_bias", branch.up_bias)
        self.register_buffer("gate_bias", branch.gate_bias)

    def forward(
        self, up: Float[Tensor, "*tokens neurons"], gate: Float[Tensor, "*tokens neurons"] | None
    ) -> Float[Tensor, "*tokens neurons"]:
        up = up if self.up_bias is None else up + self.up_bias
        if gate is None:
            return self.act(up)  # type: ignore[no-any-return]
        gate = gate if self.gate_bias is None else gate + self.gate_bias
        return self.act(gate) * up  # type: ignore[no-any-return]


class _Reader(nn.Module):
    """The outputs of several projections of one input, those of equal nodes from one product."""

    def __init__(self, projections: Sequence[Projection]) -> None:
        super().__init__()
        parts = [written(projection) for projection in projections]
        self.places = _groups([part.node for part in parts])
        self.rows = [[parts[place].node.rows for place in places] for places in self.places]
        self.nodes = nn.ModuleList(_stacked([parts[place].node for place in places]) for places in self.places)
        self.then = nn.ModuleList(nn.Identity() if part.then is None else part.then for part in parts)

    def forward(self, x: Float[Tensor, "*tokens d_model"]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for node, places, rows in zip(self.nodes, self.places, self.rows, strict=True):
            out = node(x)
            pieces = [out] if len(places) == 1 else torch.split(out, rows, dim=-1)
            found |= dict(zip(places, pieces, strict=True))
        return [then(found[place]) for place, then in enumerate(self.then)]


def _groups(nodes: Sequence[Node]) -> list[list[int]]:
    """The places of the nodes that become one, in the order of their first."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for place, node in enumerate(nodes):
        alike.setdefault(node.key, []).append(place)
    groups: list[list[int]] = []
    for places in alike.values():
        groups += [places] if len(places) >= nodes[places[0]].worth else [[place] for place in places]
    return groups


def _stacked(nodes: list[Node]) -> Node:
    return nodes[0] if len(nodes) == 1 else nodes[0].stacked(nodes[1:])
