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
from ffsplit.methods.shared import Merge, SharedConfig, Sharing, Tie, tied_structure
from ffsplit.ops.matching import linear_cka, token_gram

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
        rank: of the difference to the owner that every shared matrix stores; None takes what the budget leaves.
        tie: ``inner`` shares `up` and `gate` and leaves every layer a `down` of its own, which is fitted to its
            outputs; ``all`` shares all three.
        match: how a layer's neurons find their counterparts in the owner (Hungarian assignment): by the correlation of
            their ``activations`` on the same inputs, by their ``weights``, or ``none``.
        merge: what is shared: the weights of the group's first layer (``owner``), or the ``average`` of the matched
            neurons of all, weighted by the energy of their outputs.
        ridge: pull of the fit of `down` to the old weights, relative to the mean diagonal of the hidden Gram.
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

    @model_validator(mode="after")
    def _nothing_to_average(self) -> ShareConfig:
        if self.merge == "average" and self.match == "none":
            raise ValueError("merge: average needs match: activations or weights; unmatched neurons have no mean")
        return self

    @property
    def sharing(self) -> Sharing:
        """What every FFN of a group is told."""
        return Sharing(tie=self.tie, match=self.match, merge=self.merge, ridge=self.ridge)

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


def _limits(shapes: Sequence[FFNShape], found: Sequence[Group], config: ShareConfig) -> tuple[int, int]:
    """Smallest and largest rank of a difference.

    Raises:
        RecipeError: the rank that was asked for is above what the matrices have.
    """
    alike = [shapes[run[0]] for run in found]
    if config.rank is None:
        return 0, min(shape.d_ff * shape.d_model // (shape.d_ff + shape.d_model) for shape in alike)
    highest = min(min(shape.d_ff, shape.d_model) for shape in alike)
    if config.rank > highest:
        raise RecipeError(f"rank={config.rank}: the matrices have rank {highest} at most")
    return config.rank, config.rank


def _chosen(shapes: Sequence[FFNShape], partitions: Iterable[Partition], config: ShareConfig) -> tuple[Partition, int]:
    dense = sum(shape.parameters for shape in shapes)

    def stored(partition: Partition, rank: int) -> int:
        saved = 0
        for group in partition:
            shape = shapes[group[0]]
            tied = tied_structure(shape, config.sharing, "owner", rank)
            saved += (len(group) - 1) * (shape.parameters - tied.parameters)
        return dense - saved

    found = runs(shapes, config.protect_first, config.protect_last)
    return choose(partitions, stored, int(config.keep * dense), dense, _limits(shapes, found, config))


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
        rank = 0
    else:
        stack_of = {site.name: block.list_path for block in scene.found.blocks for site in block.sites}
        stacks = [stack_of[name] for name in names]
        found = runs(scene.shapes, config.protect_first, config.protect_last, stacks)
        partition, rank = _chosen(scene.shapes, _partitions(scene, found, config), config)
    decision: Decision = [None] * len(names)
    for group in partition:
        for place, index in enumerate(group):
            if len(group) > 1 or config.full_budget:
                decision[index] = SharedConfig(
                    owner=names[group[0]],
                    members=group,
                    place=place,
                    rank=rank if place else 0,
                    sharing=config.sharing,
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
