"""The runnable compressed FFN: a sum of branches, an optional linear map, and an optional bias."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ffsplit.errors import ModelError
from ffsplit.ffn.activated import activated
from ffsplit.ffn.fused import FusedBranches
from ffsplit.ffn.lookup import Lookup
from ffsplit.ffn.merged import MergedCache, merged_sum
from ffsplit.ffn.pieces import in_pieces, pays_in_pieces
from ffsplit.ffn.projections import Dense, Projection, empty_projection
from ffsplit.ffn.selectors import Selector, empty_selector
from ffsplit.ffn.skips import Skip
from ffsplit.ffn.spec import BranchSpec, SumSpec
from ffsplit.ffn.thresholded import ThresholdedBranches
from ffsplit.ffn.weights import FFNWeights, joined_biases
from ffsplit.kernels.activations import biased


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor)


class Branch(nn.Module):
    """A smaller FFN over some of the neurons, each projection in its own storage."""

    up_bias: nn.Parameter | None
    gate_bias: nn.Parameter | None

    def __init__(
        self,
        act: nn.Module | None,
        up: Projection,
        down: Projection,
        gate: Projection | None = None,
        up_bias: Float[Tensor, " neurons"] | None = None,
        gate_bias: Float[Tensor, " neurons"] | None = None,
        selector: Selector | None = None,
    ) -> None:
        super().__init__()
        # A copy: branches of one FFN must not share an activation's parameters, files hold no tensor twice.
        self.act = nn.Identity() if act is None else copy.deepcopy(act)
        self.activated = act is not None
        self.up = up
        self.gate = gate
        self.down = down
        self.selector = selector
        self.register_parameter("up_bias", _parameter(up_bias))
        self.register_parameter("gate_bias", _parameter(gate_bias))

    @property
    def spec(self) -> BranchSpec:
        return BranchSpec(
            up=self.up.spec,
            down=self.down.spec,
            gate=None if self.gate is None else self.gate.spec,
            up_bias=self.up_bias is not None,
            gate_bias=self.gate_bias is not None,
            selector=None if self.selector is None else self.selector.spec,
            act="model" if self.activated else "none",
        )

    def hidden(self, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens neurons"]:
        """Activations of this branch's neurons, the input of its ``down``."""
        if self.selector is None:
            return self.hidden_of(self.up(x), None if self.gate is None else self.gate(x))
        up = biased(self.up(self.selector.inputs(x, "up")), self.up_bias)
        if self.gate is None:
            return self._selected(self.act(up), x)
        gate = biased(self.gate(self.selector.inputs(x, "gate")), self.gate_bias)
        return self._selected(self.act(gate), x, up)

    def hidden_of(
        self, up: Float[Tensor, "*tokens neurons"], gate: Float[Tensor, "*tokens neurons"] | None
    ) -> Float[Tensor, "*tokens neurons"]:
        """Activations from the outputs of ``up`` and ``gate``; only without a selector."""
        return activated(self.act, up, gate, self.up_bias, self.gate_bias)

    def _selected(
        self, a: Float[Tensor, "*tokens neurons"], x: Float[Tensor, "*tokens d_model"], up: Tensor | None = None
    ) -> Float[Tensor, "*tokens neurons"]:
        """Hidden activations from the activation's outputs, as far as the selector lets them through."""
        assert self.selector is not None
        a = self.selector.activations(a, x, self.act)
        return self.selector.hidden(a if up is None else a * up)

    def forward(self, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens d_model"]:
        return self.down(self.hidden(x))  # type: ignore[no-any-return]


class SumFFN(nn.Module):
    """``sum_b branch_b(x) + linear(x) + bias``: what every method of this package produces.

    The branches are stored heavy first. An empty sum is a dropped FFN: it returns zeros (plus the bias, if any). With
    ``skip`` some tokens do without all of it.

    Attributes:
        merged: matrices of all branches in one, see :mod:`ffsplit.ffn.merged`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        branches: Sequence[Branch] = (),
        linear: Projection | None = None,
        bias: Float[Tensor, " d_model"] | None = None,
        lookup: Lookup | None = None,
        skip: Skip | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.branches = nn.ModuleList(branches)
        self.linear = linear
        self.lookup = lookup
        self.skip = skip
        self.register_parameter("bias", _parameter(bias))
        self.merged = MergedCache()
        self._fused = FusedBranches()
        self._thresholded = ThresholdedBranches()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SumFFN:
        # A cast or a move may leave the tensors' versions as they were.
        self.merged.drop()
        self._fused.drop()
        self._thresholded.drop()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def spec(self) -> SumSpec:
        return SumSpec(
            d_model=self.d_model,
            branches=tuple(branch.spec for branch in self._branches()),
            linear=None if self.linear is None else self.linear.spec,
            bias=self.bias is not None,
            lookup=None if self.lookup is None else self.lookup.spec,
            skip=None if self.skip is None else self.skip.spec,
        )

    def _branches(self) -> list[Branch]:
        return [branch for branch in self._stored().values() if isinstance(branch, Branch)]

    def _own_bias(self) -> Tensor | None:
        try:  # an attribute that is a parameter takes longer to look up
            return self._parameters["bias"]
        except KeyError:  # pruned, parametrized, or of a replica
            return self.bias

    def _stored(self) -> dict[str, nn.Module | None]:
        """The branches, or what has taken the place of one; an attribute that is a module takes longer to look up."""
        branches = self._modules["branches"]
        assert branches is not None
        return branches._modules

    @classmethod
    def empty(cls, spec: SumSpec, act: nn.Module, dtype: torch.dtype, device: torch.device | str) -> SumFFN:
        """An uninitialised sum of the given structure, ready to be loaded into."""
        device = torch.device(device)

        def vector(size: int, wanted: bool) -> Tensor | None:
            return torch.empty(size, dtype=dtype, device=device) if wanted else None

        branches = [
            Branch(
                act if branch.act == "model" else None,
                empty_projection(branch.up, dtype, device),
                empty_projection(branch.down, dtype, device),
                None if branch.gate is None else empty_projection(branch.gate, dtype, device),
                vector(branch.neurons, branch.up_bias),
                vector(branch.neurons, branch.gate_bias),
                None if branch.selector is None else empty_selector(branch.selector, dtype, device),
            )
            for branch in spec.branches
        ]
        linear = None if spec.linear is None else empty_projection(spec.linear, dtype, device)
        skip = None if spec.skip is None else Skip.empty(spec.skip, dtype, device)
        lookup = None if spec.lookup is None else Lookup.empty(spec.lookup, dtype, device)
        return cls(spec.d_model, branches, linear, vector(spec.d_model, spec.bias), lookup, skip)

    def forward(self, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens d_model"]:
        return self._whole(x) if self.skip is None else self.skip(x, self._whole)  # type: ignore[no-any-return]

    def _whole(self, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens d_model"]:
        branches = self._branches()
        pieces = self.lookup is None and pays_in_pieces(x, branches, self.linear, self.merged)
        return in_pieces(x, lambda piece: self._sum(piece, branches)) if pieces else self._sum(x, branches)

    def _sum(self, x: Float[Tensor, "*tokens d_model"], branches: list[Branch]) -> Float[Tensor, "*tokens d_model"]:
        fused = total = None
        bias = self._own_bias()
        if len(branches) == len(self._stored()):  # what has taken a branch's place is known to none of these
            fused = self._fused(x, branches, bias)
            if fused is None:
                fused = self._thresholded(x, branches, bias)
            total = merged_sum(x, branches, self.merged) if fused is None else fused
        for branch in self.branches if total is None else ():
            out = branch(x)
            total = out if total is None else total + out
        for term in (self.linear, self.lookup):
            if term is not None:
                out = term(x)
                total = out if total is None else total + out
        if total is None:
            total = torch.zeros_like(x)
        return total if fused is not None or bias is None else total + bias

    @torch.no_grad()
    def to_weights(self, dtype: torch.dtype | None = None) -> FFNWeights:
        """The same function as one dense FFN: branches decoded and concatenated.

        Args:
            dtype: of all tensors; None leaves each as it is stored (packed codes become float32).

        Raises:
            ModelError: the sum has a linear map, lookup tables or no branch, works for some tokens only, a branch does
                so or has no activation, inputs that are rounded at run time, or branches with and without a gate,
                which no dense FFN of this shape expresses.
        """
        branches = self._branches()
        if self.lookup is not None:
            raise ModelError("lookup tables cannot be written as dense weights")
        if self.skip is not None or any(branch.selector is not None for branch in branches):
            raise ModelError("an FFN whose neurons work for some tokens only cannot be written as dense weights")
        if self.spec.rounds_inputs:
            raise ModelError("an FFN that rounds its inputs at run time cannot be written as dense weights")
        if self.linear is not None or not branches:
            raise ModelError("a dropped FFN or one with a linear map cannot be written as dense up/gate/down weights")
        if not all(branch.activated for branch in branches):
            raise ModelError("neurons without an activation cannot be written as dense weights of this model")
        gates = [branch.gate for branch in branches if branch.gate is not None]
        if len(gates) not in (0, len(branches)):
            raise ModelError("branches with and without a gate cannot be written as one dense FFN")
        up, sizes = torch.cat([branch.up.dense(dtype) for branch in branches]), [b.up.spec.shape[0] for b in branches]
        return FFNWeights(
            up=up,
            down=torch.cat([branch.down.dense(dtype) for branch in branches], dim=1),
            act=branches[0].act,
            gate=torch.cat([gate.dense(dtype) for gate in gates]) if gates else None,
            up_bias=joined_biases([branch.up_bias for branch in branches], sizes, up.dtype),
            gate_bias=joined_biases([branch.gate_bias for branch in branches], sizes, up.dtype),
            down_bias=None if self.bias is None else self.bias.to(dtype or self.bias.dtype),
        )


def dense_branch(ffn: FFNWeights) -> Branch:
    """All neurons of a dense FFN as one dense branch (its ``down_bias`` belongs to the sum)."""
    return Branch(
        ffn.act,
        Dense(ffn.up),
        Dense(ffn.down),
        None if ffn.gate is None else Dense(ffn.gate),
        ffn.up_bias,
        ffn.gate_bias,
    )
