"""One FFN for several layers: the first of a group owns the weights, the others are tied to it.

This is the step that the planner ``share`` decides on for every FFN of a group. It is no method of its own: what a
layer becomes depends on another layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator
from torch import Tensor

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.projections import Dense, DenseSpec, Projection, StorageSpec, Tied, TiedSpec
from ffsplit.ffn.projections.tied import Place
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import BranchSpec, SumSpec
from ffsplit.ffn.sum import Branch, SumFFN, dense_branch
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods.assemble import Part, fit_parts
from ffsplit.methods.budgets import dense_branch_spec, sum_spec
from ffsplit.methods.compressors import Compressor, GramOfInputs
from ffsplit.methods.matched import Match, in_order_of, mean_of
from ffsplit.methods.registry import MethodConfig, method
from ffsplit.methods.widened import UsedAt, after, fit_wide, padded, place_of, wider
from ffsplit.ops.lowrank import svd_factors, whitened_factors

Tie = Literal["inner", "all"]
Merge = Literal["owner", "average"]


class Sharing(BaseModel):
    """How the FFNs of a group become one.

    Attributes:
        tie: ``inner`` shares `up` and `gate` and leaves every layer a `down` of its own, which is fitted to its
            outputs; ``all`` shares all three.
        match: how a layer's neurons find their counterparts in the owner: by the correlation of their activations on
            the same text, by their weights, or not at all.
        merge: what is shared: the weights of the group's first layer, or the mean of the matched neurons of all.
        ridge: pull of the fit of `down` to the old weights, relative to the mean diagonal of the hidden Gram.
        widen: whether the shared FFN takes up neurons of the other members, and `down` is fitted to all its places.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    tie: Tie = "inner"
    match: Match = "activations"
    merge: Merge = "owner"
    ridge: float = Field(default=1e-3, ge=0)
    widen: bool = False

    @property
    def by_text(self) -> bool:
        """Whether anything is fitted to text."""
        return self.match == "activations" or self.tie == "inner" or self.widen


class SharedConfig(MethodConfig):
    """The place of one FFN in its group.

    Attributes:
        owner: site name of the FFN that owns the weights.
        members: the group's FFNs by their place in the execution order, the owner first.
        place: of this FFN in the group; 0 is the owner.
        rank: of the difference to the owner's weights that this FFN stores.
        sharing: how the group becomes one.
        extra: neurons that the shared FFN has beside those of one layer.
    """

    method: Literal["shared"] = "shared"
    owner: str
    members: tuple[NonNegativeInt, ...] = Field(min_length=1)
    place: int = Field(ge=0)
    rank: int = Field(0, ge=0)
    sharing: Sharing = Sharing()
    extra: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _in_the_group(self) -> SharedConfig:
        if self.place >= len(self.members):
            raise ValueError(f"place {self.place} is not in a group of {len(self.members)}")
        return self

    @property
    def full_budget(self) -> bool:
        """Whether this FFN keeps its own weights as they are."""
        alone = len(self.members) == 1
        return self.place == 0 and (alone or (self.sharing.merge == "owner" and not self.sharing.widen))

    @property
    def needs_data(self) -> bool:
        return self.sharing.by_text and not self.full_budget


def structure(shape: FFNShape, config: SharedConfig) -> SumSpec:
    """The owner is dense; the others are tied to it."""
    if config.place == 0:
        return owner_structure(shape, config.extra)
    return tied_structure(shape, config.sharing, config.owner, config.rank, config.extra)


def owner_structure(shape: FFNShape, extra: int) -> SumSpec:
    """One dense branch of all neurons and ``extra`` ones."""
    return sum_spec(shape, [dense_branch_spec(shape, shape.d_ff + extra)], bias=shape.down_bias)


def tied_structure(shape: FFNShape, sharing: Sharing, owner: str, rank: int, extra: int = 0) -> SumSpec:
    """One branch of all the owner's neurons, its matrices the owner's plus a difference of ``rank``."""
    width = shape.d_ff + extra

    def tied(place: Place, rows: int, columns: int) -> TiedSpec:
        return TiedSpec(shape=(rows, columns), owner=owner, projection=place, rank=rank)

    outer = (shape.d_model, width)
    branch = BranchSpec(
        up=tied("up", width, shape.d_model),
        gate=tied("gate", width, shape.d_model) if shape.gated else None,
        down=tied("down", *outer) if sharing.tie == "all" else DenseSpec(shape=outer),
        up_bias=shape.up_bias,
        gate_bias=shape.gate_bias,
    )
    return sum_spec(shape, [branch], bias=shape.down_bias)


@dataclass(frozen=True)
class Tying(Compressor):
    """A matrix as the owner's plus what a low-rank difference can repair.

    Attributes:
        owner: the branch that stores the weights.
        whitened: fit the difference in the norm of the inputs.
    """

    owner: Branch
    whitened: bool

    @property
    def needs_gram(self) -> bool:
        return self.whitened

    def fit(
        self, weights: Sequence[Tensor], spec: StorageSpec, gram: GramOfInputs, dtype: torch.dtype
    ) -> list[Projection]:
        assert isinstance(spec, TiedSpec)
        places: tuple[Place, ...] = (spec.projection,) if len(weights) == 1 else ("up", "gate")
        return [
            self._tied(weight, spec.model_copy(update={"projection": place}), gram, dtype)
            for weight, place in zip(weights, places, strict=True)
        ]

    def _tied(self, weight: Tensor, spec: TiedSpec, gram: GramOfInputs, dtype: torch.dtype) -> Tied:
        owner = getattr(self.owner, spec.projection)
        if not spec.rank:
            return Tied(spec, owner)
        difference = weight.double() - owner.dense(torch.float64)
        if self.whitened and gram is not None:
            a, b = whitened_factors(difference, gram, spec.rank)
        else:
            a, b = svd_factors(difference, spec.rank)
        return Tied(spec, owner, a.to(dtype), b.to(dtype))


@method(
    "shared",
    summary="one FFN of a group of layers that share their weights",
    paper="One Wide FFN 2309.01826, MobiLlama 2402.16840, EdgeFormer 2202.07959",
    budget=(),
    as_sum="one branch: dense in the owner, tied to it in the others",
    config=SharedConfig,
    structure=structure,
    status="experimental",
    alone=False,
)
def shared(data: LayerData, config: SharedConfig) -> SumFFN:
    """The owner becomes the mean of its group, or its widened FFN; a member is fitted on the owner's weights."""
    sharing, shape = config.sharing, FFNShape.of(data.ffn)
    if config.place:
        return _tied_to(data, data.fitted[config.members[0]], structure(shape, config), sharing, sharing.match)
    if sharing.widen:
        return _widened(data, config)
    mean = SumFFN(data.ffn.d_model, [dense_branch(_merged(data, config))])
    spec = tied_structure(shape, sharing, config.owner, rank=0)
    return _written_out(_tied_to(data, mean, spec, sharing, "none"))


def _merged(data: LayerData, config: SharedConfig) -> FFNWeights:
    """What the group shares before `down` is fitted: the owner's FFN, or the mean of all."""
    sharing = config.sharing
    if sharing.merge == "owner":
        return data.ffn
    with_down = sharing.tie == "all"
    others = (data.others[index] for index in config.members[1:])
    group = [in_order_of(data.ffn, other, sharing.match, data, with_down=with_down) for other in others]
    return mean_of([data.ffn, *group], data, by_text=sharing.by_text)


def _widened(data: LayerData, config: SharedConfig) -> SumFFN:
    """The owner with neurons of the others, its `down` fitted to every layer that uses it."""
    sharing, base = config.sharing, _merged(data, config)
    ahead = {index: data.ahead[index] for index in config.members[1:]}
    try:
        members = [
            place_of(
                base, replace(data, ffn=data.others[index], inputs=inputs, corrections=None, memo={}), sharing.match
            )
            for index, inputs in ahead.items()
        ]
        wide = wider(base, members, config.extra)
        own = UsedAt(data, data.ffn)
        return fit_wide(wide, [own, *members] if sharing.tie == "all" else [own], sharing.ridge)
    finally:
        for inputs in ahead.values():
            inputs.drop()


def _tied_to(data: LayerData, owner: SumFFN, spec: SumSpec, sharing: Sharing, match: Match) -> SumFFN:
    """One FFN tied to a sum that is at least as wide, everything that it stores itself fitted to its outputs."""
    shared = owner.to_weights(torch.float32)
    theirs = shared.take(torch.arange(data.ffn.d_ff, device=shared.up.device))
    ffn = in_order_of(theirs, data.ffn, match, data, with_down=sharing.tie == "all")
    ffn = padded(ffn, after(shared, ffn.d_ff))
    branch = owner.branches[0]
    assert isinstance(branch, Branch)
    tied = spec.branches[0].up
    assert isinstance(tied, TiedSpec)
    how = Tying(branch, whitened=sharing.by_text and tied.rank > 0)
    part = Part(torch.arange(ffn.d_ff, device=ffn.up.device), spec.branches[0], how)
    return fit_parts(replace(data, ffn=ffn), [part], spec, refit=sharing.by_text, ridge=sharing.ridge)


def _written_out(module: SumFFN) -> SumFFN:
    """The same sum with its tied projections dense: an owner stores what its fit was tied to."""
    for branch in module.branches:
        for name, projection in branch.named_children():
            if isinstance(projection, Tied):
                setattr(branch, name, Dense(projection.dense()))
    return module
