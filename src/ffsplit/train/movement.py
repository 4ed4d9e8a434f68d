"""Movement pruning: which neurons stay is learned while the model is trained, by masks that are then carried out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ffsplit.errors import BudgetError, ModelError, RecipeError
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.train.masked import MaskedDown, mask_neurons, remove_masked, unmask

Scope = Literal["model", "ffn"]


@dataclass(frozen=True)
class Movement:
    """How many neurons stay, what they compete for, and when the others go.

    Attributes:
        keep: share of the FFN parameters that stays, above 0 and at most 1.
        scope: ``model``: neurons of all FFNs compete, so that each ends at a width of its own; ``ffn``: those of each.
        begin: share of the steps with all neurons, in which scores gather.
        end: share of the steps after which the masks stay what they are. Between the two, the share of the parameters
            that is left falls along a cubic.

    Reference: Sanh et al., arXiv 2005.07683, section 4 (the cubic schedule of Zhu and Gupta, arXiv 1710.01878).
    """

    keep: float
    scope: Scope = "model"
    begin: float = 0.1
    end: float = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise RecipeError(f"masks: keep={self.keep} must be above 0 and at most 1 (share of the FFN parameters)")
        if self.scope not in ("model", "ffn"):
            raise RecipeError(f"masks: scope={self.scope!r} is neither 'model' nor 'ffn'")
        if not 0 <= self.begin < self.end < 1:
            raise RecipeError(f"masks: begin={self.begin} and end={self.end} must be 0 <= begin < end < 1")

    def window(self, steps: int) -> tuple[int, int]:
        """Steps, counted from 0, of the first masks after the first gradients, and of the last change.

        Raises:
            RecipeError: there are too few steps.
        """
        begin, end = max(1, round(self.begin * steps)), round(self.end * steps)
        if not begin < end < steps:
            raise RecipeError(f"masks: {steps} steps are too few to learn masks and to train what is left")
        return begin, end


class _Competitors:
    """Neurons that compete for one budget.

    Attributes:
        masks: of their FFNs.
        now: parameters that all of them have.
        final: parameters that may stay.
    """

    def __init__(self, masks: Sequence[MaskedDown], costs: Sequence[int], final: int) -> None:
        self.masks, self.final = list(masks), final
        self._sizes = [len(mask.mask) for mask in masks]
        self._costs = torch.cat([
            torch.full((size,), cost, device=mask.mask.device)
            for mask, size, cost in zip(masks, self._sizes, costs, strict=True)
        ])  # fmt: skip
        self.now = sum(size * cost for size, cost in zip(self._sizes, costs, strict=True))

    @torch.no_grad()
    def choose(self, gone: float) -> None:
        """Mask all but the best, the best of every FFN excepted, so that a share of what is to go is gone."""
        budget = self.final + int((self.now - self.final) * (1 - gone))
        kept = _best_within([mask.score for mask in self.masks], self._costs, budget)
        for mask, chosen in zip(self.masks, kept.split(self._sizes), strict=True):  # type: ignore[no-untyped-call]
            mask.mask.copy_(chosen)


def _best_within(
    scores: Sequence[Float[Tensor, "..."]], costs: Int[Tensor, " all"], budget: int
) -> Float[Tensor, " all"]:
    """1 for the neurons of highest score that a budget pays for, and for the highest of every FFN; 0 for the others.

    No number leaves the device, so that a training step need not wait for it.
    """
    first = [torch.where(torch.arange(len(s), device=s.device) == s.argmax(), torch.inf, s) for s in scores]
    order = torch.argsort(torch.cat(first), descending=True, stable=True)
    kept = torch.zeros(len(order), device=order.device)
    kept[order] = (costs[order].cumsum(0) <= budget).to(kept.dtype)
    return kept


class NeuronMasks:
    """The masks of a model under way: what the training loop tells its steps to."""

    def __init__(
        self, masks: Mapping[str, MaskedDown], groups: Sequence[_Competitors], window: tuple[int, int]
    ) -> None:
        self._masks, self._groups, self.window = dict(masks), list(groups), window

    def before(self, step: int) -> None:
        """Set the masks of a step, counted from 0; they depend on it and on the scores alone."""
        begin, end = self.window
        if step < begin or not all(mask.learning for mask in self._masks.values()):
            return
        done = min((step - begin + 1) / (end - begin + 1), 1.0)
        for group in self._groups:
            group.choose(1 - (1 - done) ** 3)
        if step >= end:
            for mask in self._masks.values():
                mask.learning = False

    def settled(self, steps: int) -> bool:
        """Whether the weights after so many steps go with the masks that stay."""
        return steps > self.window[1]

    def widths(self) -> dict[str, int]:
        """Neurons that are left, by FFN."""
        return {name: int(mask.mask.sum()) for name, mask in self._masks.items()}


@contextmanager
def learned_masks(
    sums: Mapping[str, SumFFN], movement: Movement, steps: int, dense: int | None = None
) -> Iterator[NeuronMasks]:
    """Masks on all neurons of some FFNs; afterwards the masked neurons are gone, or, after an error, the masks.

    AdamW's steps do not depend on the size of a gradient, and the order of the scores, which start at 0, not on the
    size of the steps: their learning rate is of no consequence, and is that of the weights.

    Args:
        sums: each of one dense branch, by name.
        movement: how many stay.
        steps: of the training.
        dense: parameters of which ``keep`` is a share; None: those that these FFNs have.

    Raises:
        ModelError: an FFN is not one dense branch.
        BudgetError: the budget leaves an FFN no neuron, or is above what there is.
        RecipeError: there are too few steps.
    """
    specs = {name: module.spec for name, module in sums.items()}
    window, budgets = movement.window(steps), budgets_for(specs, movement, dense)
    masks = {name: mask_neurons(module) for name, module in sums.items()}
    groups = [
        _Competitors([masks[name] for name in names], [_neuron_cost(specs[name]) for name in names], budget)
        for names, budget in budgets
    ]
    try:
        yield NeuronMasks(masks, groups, window)
    except BaseException:
        for module in sums.values():
            unmask(module)
        raise
    for module in sums.values():
        remove_masked(module)


def budgets_for(
    specs: Mapping[str, SumSpec], movement: Movement, dense: int | None = None
) -> list[tuple[list[str], int]]:
    """FFNs that compete, and the parameters of all their neurons in the end, output biases paid for.

    Raises:
        ModelError: there is no FFN, or one whose neurons cannot simply be taken out.
        BudgetError: the budget leaves an FFN no neuron, or is above what there is.
    """
    _check_maskable(specs)
    have = {name: spec.parameters for name, spec in specs.items()}
    share = movement.keep * (sum(have.values()) if dense is None else dense) / sum(have.values())
    if share > 1:
        raise BudgetError(f"masks: keep={movement.keep} is more than the FFNs have left")
    groups = [list(specs)] if movement.scope == "model" else [[name] for name in specs]
    found = []
    for names in groups:
        total = sum(have[name] for name in names)
        fixed = sum(specs[name].bias * specs[name].d_model for name in names)
        budget = int(share * total) - fixed
        least = sum(_neuron_cost(specs[name]) for name in names)
        if budget < least:
            smallest = movement.keep * (least + fixed) / (share * total)
            raise BudgetError(
                f"masks: keep={movement.keep} leaves no neuron for {names[0]}; the smallest reachable keep is "
                f"{smallest:.4f}"
            )
        found.append((names, budget))
    return found


def _check_maskable(specs: Mapping[str, SumSpec]) -> None:
    if not specs:
        raise ModelError("masks: the model has no FFNs")
    for name, spec in specs.items():
        if not spec.is_one_dense_branch:
            raise ModelError(
                f"masks: {name} is {spec.describe()}; neurons can be masked and removed in dense or pruned FFNs alone"
            )


def _neuron_cost(spec: SumSpec) -> int:
    """Parameters of one neuron, biases included."""
    branch = spec.branches[0]
    return len(branch.projections) * spec.d_model + branch.up_bias + branch.gate_bias
