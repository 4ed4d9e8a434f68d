"""Sums whose last branch leaves out neurons under thresholds, by kernels that leave out their weights too.

For few tokens on NVIDIA GPUs (:mod:`ffsplit.kernels.threshold`) and one token on CPUs
(:mod:`ffsplit.kernels.cpu_threshold`). Both read `down` neuron after neuron, of which a copy is kept: a third of a
gated FFN's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ffsplit.ffn.activated import activation_name
from ffsplit.ffn.places import Held, Place, tensors_at
from ffsplit.ffn.projections import Dense
from ffsplit.ffn.selectors import Threshold
from ffsplit.ffn.watched import WatchedBranches
from ffsplit.kernels import cpu_threshold
from ffsplit.kernels.activations import biased
from ffsplit.kernels.cache import counted_transpose
from ffsplit.kernels.dispatch import FLOATS, as_autocast, belong, is_differentiated, takes_kernels
from ffsplit.kernels.low_bit import ALIGNMENT
from ffsplit.kernels.threshold import (
    BRANCH_TENSORS,
    ThresholdFFN,
    ThresholdShape,
    takes,
    threshold_ffn,
)

if TYPE_CHECKING:
    from ffsplit.ffn.sum import Branch

TRACED_DEVICES = ("cuda",)
PROJECTIONS = ("gate", "up", "down")
HEAVY_DOWN, REST_DOWN = BRANCH_TENSORS - 1, 2 * BRANCH_TENSORS - 1
MATRICES = (0, 2, HEAVY_DOWN, BRANCH_TENSORS, BRANCH_TENSORS + 2, REST_DOWN)
"""Places among the tensors of :class:`ffsplit.kernels.threshold.ThresholdFFN`."""


@dataclass(frozen=True)
class _Known:
    """What was found out about the branches of a sum, with the places where it was found.

    Attributes:
        modules: where the modules are on which it depends, and which they were.
        tensors: where the tensors are, in the order of :class:`ffsplit.kernels.threshold.ThresholdFFN` without the
            bias of the sum; None: there is none.
        shape: None: these branches are not of this kind.
        on_gpu: whether the GPU's kernels know them.
    """

    modules: Held
    tensors: tuple[Place | None, ...]
    shape: ThresholdShape | None
    on_gpu: bool

    @classmethod
    def of(cls, branches: Sequence[Branch]) -> _Known:
        names = ("act", "selector", *PROJECTIONS)
        shape = threshold_shape(branches)
        return cls(
            Held.at([(branch._modules, name) for branch in branches for name in names]),
            () if shape is None else tuple(_places(branches)),
            shape,
            shape is not None and shape.is_supported,
        )


class ThresholdedBranches(WatchedBranches[_Known, ThresholdFFN | None]):
    """Runs the branches of a sum without the weights of neurons that a threshold leaves out, where that is faster."""

    def _look(self, branches: Sequence[Branch]) -> _Known:
        return _Known.of(branches)

    def __call__(
        self, x: Float[Tensor, "*tokens d_model"], branches: Sequence[Branch], bias: Tensor | None
    ) -> Tensor | None:
        """The outputs of all branches and the bias together; None where this does not apply."""
        if torch.compiler.is_compiling():
            return _traced(x, branches, bias)
        # Before anything else: for other sums this must cost nothing.
        if not branches or branches[-1]._modules.get("selector") is None:
            return None
        if not takes_kernels(x, ()) or as_autocast(x) is not x:
            return None
        known = self._found(branches)
        shape = known.shape
        if shape is None or x.shape[-1] != shape.d_model:  # the plain path says what is wrong
            return None
        on_cpu = x.device.type == "cpu" and cpu_takes(x, shape)
        if not on_cpu and not (known.on_gpu and takes(x, shape)):
            return None
        tensors = [*tensors_at(known.tensors), bias]
        if not takes_kernels(x, tensors) or not _fit(x, tensors):
            return None
        return self._one(x, tensors, branches) if on_cpu else self._few(x, tensors, shape)

    def _few(self, x: Tensor, tensors: list[Tensor | None], shape: ThresholdShape) -> Tensor | None:
        """Launches, made ready once for every number of tokens, as long as the tensors stay where they are."""
        downs = self._neuron_major([tensors[HEAVY_DOWN], tensors[REST_DOWN]])
        if downs is None:
            return None
        tensors[HEAVY_DOWN], tensors[REST_DOWN] = downs
        tokens = x.numel() // shape.d_model

        def make(addresses: list[int]) -> ThresholdFFN | None:
            if any(addresses[at] % ALIGNMENT for at in MATRICES):
                return None
            made = ThresholdFFN(tensors, shape, tokens, x.dtype, x.device.index or 0)
            return made if made.is_compiled else None

        launch = self._launch((tokens, x.dtype), tensors, make)
        return None if launch is None else launch(x)

    def _one(self, x: Tensor, tensors: list[Tensor | None], branches: Sequence[Branch]) -> Tensor | None:
        """One token on a CPU: which neurons work is looked at, which a GPU would have to wait for."""
        downs = self._neuron_major([tensors[REST_DOWN]])
        if downs is None or downs[0] is None:
            return None
        total = _one_token(x.reshape(1, -1), branches[-1], downs[0])
        if len(branches) > 1:
            total = branches[0](x.reshape(1, -1)) + total
        bias = tensors[-1]
        return (total if bias is None else total + bias).view(x.shape)

    def _neuron_major(self, downs: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        """Each ``down`` neuron after neuron; None if there is no room to keep copies."""
        present = [down for down in downs if down is not None]
        copied = sum(down.nbytes for down in present if not down.t().is_contiguous())
        key = "neuron_major"
        if not self.derived.has_room(key, present, copied):
            return None
        made = iter(self.derived.get(key, present, lambda: [counted_transpose(down) for down in present]))
        return [None if down is None else next(made) for down in downs]


def threshold_shape(branches: Sequence[Branch]) -> ThresholdShape | None:
    """Of dense branches of which the last is under thresholds and another one, at most, always works; else None.

    An activation that has no name among those of the kernels is one that they do not know.
    """
    if not 1 <= len(branches) <= 2:
        return None
    *heavy, rest = branches
    selector = rest.selector
    if type(selector) is not Threshold or any(branch.selector is not None for branch in heavy):
        return None
    matrices = [matrix for branch in branches for matrix in (branch.gate, branch.up, branch.down) if matrix is not None]
    if not all(type(matrix) is Dense for matrix in matrices):
        return None
    acts, gated = {activation_name(branch.act) for branch in branches}, {branch.gate is not None for branch in branches}
    if len(gated) != 1:
        return None
    act = acts.pop() if len(acts) == 1 else None
    sizes = [branch.up.spec.shape[0] for branch in branches]
    d_model = rest.up.spec.shape[1]
    return ThresholdShape(d_model, sum(sizes[:-1]), sizes[-1], gated.pop(), selector.spec.shared, act or "")


def cpu_takes(x: Float[Tensor, "*tokens d_model"], shape: ThresholdShape) -> bool:
    """Whether one token on this CPU is worth looking at which neurons it needs."""
    one = x.numel() == shape.d_model and x.dtype in FLOATS
    return one and cpu_threshold.AVAILABLE and shape.rest * shape.d_model >= cpu_threshold.SMALLEST


def _one_token(x: Float[Tensor, "1 d_model"], branch: Branch, down: Float[Tensor, "neurons d_model"]) -> Tensor:
    """A branch under thresholds; ``down`` neuron after neuron."""
    assert branch.selector is not None
    assert isinstance(branch.up, Dense)
    compared = branch.up if branch.gate is None else branch.gate
    compared_bias = branch.up_bias if branch.gate is None else branch.gate_bias
    activated = branch.selector.activations(branch.act(biased(compared(x), compared_bias)), x, branch.act)
    working = activated[0].nonzero().squeeze(1)
    if not cpu_threshold.pays(len(working), activated.shape[1]):
        hidden = activated if branch.gate is None else activated * biased(branch.up(x), branch.up_bias)
        return branch.down(hidden)  # type: ignore[no-any-return]
    hidden = activated[0, working]
    if branch.gate is not None:
        bias = None if branch.up_bias is None else branch.up_bias[working]
        hidden = hidden * biased(cpu_threshold.rows_times_token(x, branch.up.weight, working), bias)
    return cpu_threshold.weighted_rows(down, working, hidden)


def _traced(x: Tensor, branches: Sequence[Branch], bias: Tensor | None) -> Tensor | None:
    """The same on a GPU as an operator, for compilers."""
    shape = threshold_shape(branches) if x.device.type in TRACED_DEVICES else None
    if shape is None or not takes(x, shape):
        return None
    tensors = [*tensors_at(_places(branches)), bias]
    if is_differentiated([x, *tensors]) or not _fit(x, tensors):
        return None
    return threshold_ffn(x, tensors, shape.numbers())  # type: ignore[no-any-return]


def _fit(x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Whether all tensors are where the inputs are and like them; ``down`` may lie either way."""
    others = [tensor for at, tensor in enumerate(tensors) if at not in (HEAVY_DOWN, REST_DOWN)]
    return belong(x, [*others, _by_rows(tensors[HEAVY_DOWN]), _by_rows(tensors[REST_DOWN])])


def _by_rows(down: Tensor | None) -> Tensor | None:
    """The matrix or its transpose, whichever lies row after row."""
    return down if down is None or down.is_contiguous() else down.t()


def _places(branches: Sequence[Branch]) -> list[Place | None]:
    """Where the tensors are, in the order of :class:`ffsplit.kernels.threshold.ThresholdFFN` without the last."""
    found: list[Place | None] = []
    found += [None] * BRANCH_TENSORS * (2 - len(branches))
    for branch in branches:
        gate = None if branch.gate is None else (branch.gate._parameters, "weight")
        found += [gate, (branch._parameters, "gate_bias")]
        found += [(branch.up._parameters, "weight"), (branch._parameters, "up_bias")]
        found.append((branch.down._parameters, "weight"))
    selector = branches[-1].selector
    return [*found, None if selector is None else (selector._buffers, "threshold")]
