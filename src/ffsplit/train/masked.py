"""A dense FFN whose neurons can be switched off while it is trained, and then taken out."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ffsplit.ffn.projections import Dense, Projection
from ffsplit.ffn.projections.dense import DenseSpec
from ffsplit.ffn.sum import Branch, SumFFN, dense_branch


class MaskedDown(Projection):
    """A dense ``down`` behind a mask, which is 0 or 1 for every neuron, with a score for each.

    The score takes part with the value 0 and the derivative 1, so that its gradient is that of the loss with respect to
    the mask, ``sum_tokens h_j (dL/dy W_j)``: positive where the loss would fall if the neuron gave less. Weights of
    masked neurons have no gradient.

    Attributes:
        down: the matrix.
        score: of every neuron; larger = it moves to where it lowers the loss.
        mask: of every neuron.
        learning: whether scores get gradients.

    Reference: Sanh et al., arXiv 2005.07683, section 3 (straight-through scores); Lagunas et al., arXiv 2109.04838,
    whose block is here the neuron: its rows of ``up`` and ``gate`` and its column of ``down``.
    """

    mask: Float[Tensor, " neurons"]

    def __init__(self, down: Dense) -> None:
        super().__init__()
        neurons, device = down.spec.shape[1], down.weight.device
        self.spec = down.spec
        self.down = down
        self.score = nn.Parameter(torch.zeros(neurons, device=device))
        self.register_buffer("mask", torch.ones(neurons, device=device), persistent=False)
        self.learning = True

    @classmethod
    def empty(cls, spec: DenseSpec, dtype: torch.dtype, device: torch.device) -> MaskedDown:
        return cls(Dense.empty(spec, dtype, device))

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return self.down.dense(dtype) * self.mask.to(dtype or self.down.weight.dtype)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        mask = self.mask + (self.score - self.score.detach()) if self.learning else self.mask
        return self.down(x * mask.to(x.dtype))  # type: ignore[no-any-return]


def the_branch(module: SumFFN) -> Branch:
    """The branch of a sum that has one."""
    branch = module.branches[0]
    assert isinstance(branch, Branch)
    return branch


def mask_neurons(module: SumFFN) -> MaskedDown:
    """Give every neuron of a sum of one dense branch a mask, for now 1."""
    branch = the_branch(module)
    assert isinstance(branch.down, Dense)
    branch.down = MaskedDown(branch.down)
    return branch.down


def unmask(module: SumFFN) -> None:
    """Take the masks away and leave the neurons."""
    branch = the_branch(module)
    assert isinstance(branch.down, MaskedDown)
    branch.down = branch.down.down


@torch.no_grad()
def remove_masked(module: SumFFN) -> None:
    """Take the masked neurons out: what is left computes the same and is an ordinary narrower FFN."""
    branch = the_branch(module)
    assert isinstance(branch.down, MaskedDown)
    kept = branch.down.mask.nonzero().squeeze(1)
    unmask(module)
    keep_neurons(module, kept)


@torch.no_grad()
def keep_neurons(module: SumFFN, kept: Tensor) -> None:
    """Narrow a sum of one dense branch to some of its neurons, in the given order."""
    trained = next(the_branch(module).up.parameters()).requires_grad
    narrower = dense_branch(module.to_weights().take(kept)).train(module.training)
    module.branches[0] = narrower.requires_grad_(trained)
