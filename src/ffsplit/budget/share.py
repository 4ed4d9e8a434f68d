"""Sharing one FFN among several layers, at equal structure: the planner that forms the groups."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ffsplit.budget.grouping import Group, Partition, choose, consecutive, merged, runs
from ffsplit.budget.registry import Decision, PlannerConfig, planner
from ffsplit.budget.scene import Scene
from ffsplit.errors import RecipeError
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.matched import Match
from ffsplit.methods.shared import Merge, SharedConfig, Sharing, Tie, owner_structure, tied_structure
from ffsplit.ops.matching import linear_cka, token_gram

Limits = tuple[int, int]
"""The least and the most of what a budget is spent on."""
TOKENS = 1024
"""Tokens on which layers are compared: the comparison is of token with token, so its cost grows with their square."""


class ShareConfig(PlannerConfig):
    """Which layers share, and how.

    Attributes:
        keep: share of the parameters of all FFNs that stay, at most; above 0 and at most 1. Fewer are kept where groups
            cannot be formed to measure.
        group: FFNs of a group, at most; None takes the smallest groups that the budget allows.
        groups: ``consecutive`` cuts the layers into groups of one size; ``similar`` merges neighbours whose
            activations resemble each other most (linear CKA) until the budget is met.
        protect_first: FFNs at the start that are left as they are.
        protect_last: FFNs at the end that are left as they are.
        rank: of the difference to the owner that every shared matrix stores; None takes what the budget leaves, and
            no difference with ``widen``.
        tie: ``inner`` shares `up` and `gate` and leaves every layer a `down` of its own, which is fitted to its
            outputs; ``all`` shares all three.
        match: how a layer's neurons find their counterparts in the owner (Hungarian assignment): by the correlation of
            their ``activations`` on the same inputs, by their ``weights``, or ``none``.
        merge: what is shared: the weights of the group's first layer (``owner``), or the ``average`` of the matched
            neurons of all, weighted by the energy of their outputs.
        ridge: pull of the fit of `down` to the old weights, relative to the mean diagonal of the hidden Gram.
        widen: what the budget leaves goes into further neurons of the shared FFN: those of the other layers of the
            group that it reproduces worst. A shared `down` is then fitted to all layers of the group at once.
    """

    method: Literal["share"] = "share"
    keep: float = Field(gt=0, le=1)
    group: int | None = Field(None, ge=2)
    groups: Literal["consecutive", "similar"] = "consecutive"
    protect_first: int = Field(1, ge=0)
    protect_last: int = Field(1, ge=0)
    rank: int | None = Field(None, ge=0)
    tie: Tie = "inner"
    match: Match = "activations"
    merge: Merge = "owner"
    ridge: float = Field(1e-3, ge=0)
    widen: bool = False

    @model_validator(mode="after")
    def _matched(self) -> ShareConfig:
        if self.merge == "average" and self.match == "none":
            raise ValueError("merge: average needs match: activations or weights; unmatched neurons have no mean")
        if self.widen and self.match == "none":
            raise ValueError("widen needs match: activations or weights; without counterparts no neuron is missing")
        return self

    @property
    def sharing(self) -> Sharing:
        """What every FFN of a group is told."""
        return Sharing(tie=self.tie, match=self.match, merge=self.merge, ridge=self.ridge, widen=self.widen)

    @property
    def full_budget(self) -> bool:
        return self.keep == 1

    @property
    def needs_data(self) -> bool:
        return not self.full_budget and (self.sharing.by_text or self.groups == "similar")


def check(shapes: Sequence[FFNShape], config: ShareConfig) -> None:
    """Refuse what no grouping can reach; where similarity decides, whole runs are the coarsest that it can come to."""
    if config.full_budget:
        return
    found = runs(shapes, config.protect_first, config.protect_last)
    _limits(shapes, found, config)
    if config.groups == "similar" and config.group is None:
        _chosen(shapes, [list(found)], config)
    else:
        _chosen(shapes, consecutive(found, config.group), config)


def _limits(shapes: Sequence[FFNShape], found: Sequence[Group], config: ShareConfig) -> Limits:
    """What the budget may be spent on: ranks of the differences, or neurons that every further member brings.

    Raises:
        RecipeError: the rank that was asked for is above what the matrices have.
    """
    alike = [shapes[run[0]] for run in found]
    highest = min(min(shape.d_ff, shape.d_model) for shape in alike)
    if config.rank is not None and config.rank > highest:
        raise RecipeError(f"rank={config.rank}: the matrices have rank {highest} at most")
    if config.widen:
        return 0, min(shape.d_ff for shape in alike)
    if config.rank is None:
        return 0, min(shape.d_ff * shape.d_model // (shape.d_ff + shape.d_model) for shape in alike)
    return config.rank, config.rank


def _chosen(shapes: Sequence[FFNShape], partitions: Iterable[Partition], config: ShareConfig) -> tuple[Partition, int]:
    dense = sum(shape.parameters for shape in shapes)

    def stored(partition: Partition, amount: int) -> int:
        total = dense
        for group in partition:
            shape, others = shapes[group[0]], len(group) - 1
            rank, extra = _spent(config, amount, others)
            tied = tied_structure(shape, config.sharing, "owner", rank, extra).parameters
            owner = owner_structure(shape, extra).parameters
            total += owner - shape.parameters + others * (tied - shape.parameters)
        return total

    found = runs(shapes, config.protect_first, config.protect_last)
    return choose(partitions, stored, int(config.keep * dense), dense, _limits(shapes, found, config))


def _spent(config: ShareConfig, amount: int, others: int) -> tuple[int, int]:
    """The rank of the differences and the further neurons of a group's FFN, when ``others`` share it with the owner."""
    return (config.rank or 0, amount * others) if config.widen else (amount, 0)


@planner(
    "share",
    summary="one FFN for several layers: groups store one set of weights, plus low-rank differences",
    paper="One Wide FFN 2309.01826, MobiLlama 2402.16840, EdgeFormer 2202.07959",
    budget=("keep",),
    as_sum="one dense branch in the owner of a group, tied to it in the others",
    config=ShareConfig,
    check=check,
    status="experimental",
)
def share(scene: Scene, config: ShareConfig) -> Decision:
    """Form the groups; what each layer becomes is fitted later, layer by layer."""
    names = [site.name for site in scene.found.sites]
    if config.full_budget:
        partition: Partition = [(index,) for index in range(len(names))]
        amount = 0
    else:
        stack_of = {site.name: block.list_path for block in scene.found.blocks for site in block.sites}
        stacks = [stack_of[name] for name in names]
        found = runs(scene.shapes, config.protect_first, config.protect_last, stacks)
        partition, amount = _chosen(scene.shapes, _partitions(scene, found, config), config)
    decision: Decision = [None] * len(names)
    for group in partition:
        rank, extra = _spent(config, amount, len(group) - 1)
        for place, index in enumerate(group):
            if len(group) > 1 or config.full_budget:
                decision[index] = SharedConfig(
                    owner=names[group[0]],
                    members=group,
                    place=place,
                    rank=rank if place else 0,
                    sharing=config.sharing,
                    extra=extra,
                )
    return decision


def _partitions(scene: Scene, found: Sequence[Group], config: ShareConfig) -> Iterable[Partition]:
    if config.groups == "consecutive":
        return consecutive(found, config.group)
    grams = _token_grams(scene, {index for run in found for index in run})
    return merged(found, config.group, lambda first, second: linear_cka(grams[first], grams[second]))


def _token_grams(scene: Scene, wanted: set[int]) -> dict[int, Tensor]:
    """How the layers see the same first tokens of the calibration text."""
    sizes = itertools.accumulate(next(iter(batch.values())).numel() for batch in scene.batches())
    count = next((number for number, tokens in enumerate(sizes, 1) if tokens >= TOKENS), None)
    grams = {}
    for index, data in scene.layers(count, "similarity"):
        if index in wanted:
            hidden = [data.ffn.hidden(x) for x in data.chunks()]
            grams[index] = token_gram(torch.cat(hidden)[:TOKENS]).cpu()
    return grams
