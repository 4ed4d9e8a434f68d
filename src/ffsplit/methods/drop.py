"""Dropping a whole FFN, and what may stand in its place: nothing, its mean output, or a linear map of its input."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import BudgetError
from ffsplit.ffn.projections import Dense, DenseSpec, LowRank, LowRankSpec, Projection
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.budgets import keep_budget, sum_spec
from ffsplit.methods.registry import MethodConfig, method
from ffsplit.ops.least_squares import affine_fit, affine_reduced_rank_fit

Replacement = Literal["nothing", "mean", "linear", "low-rank"]


class DropConfig(MethodConfig):
    """What stands in the place of the FFN. All of its neurons go, and its own bias with them.

    Attributes:
        replacement: ``nothing``: the FFN's place gives zeros (LLM-Drop, FinerCut); ``mean``: a bias, the mean output
            on the calibration text (the "emulated update" of 2407.16286); ``linear``: the best linear map of the
            input, with a bias; ``low-rank``: the best one of a rank, with a bias. None means ``low-rank`` where a rank
            or a budget is given, else ``mean``.
        rank: of the low-rank map.
        keep: share of the FFN's parameters for the low-rank map, instead of `rank`; when it pays for the full map, that
            is taken.
        ridge: pull of the map to zero, relative to the mean variance of the inputs.
    """

    budget_is_optional: ClassVar[bool] = True
    instead_of_budget: ClassVar[tuple[str, ...]] = ("rank",)

    method: Literal["drop"] = "drop"
    replacement: Replacement | None = None
    rank: int | None = Field(None, ge=1)
    keep: float | None = Field(None, gt=0, le=1)
    ridge: float = Field(1e-3, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> DropConfig:
        given = [name for name in ("rank", "keep") if getattr(self, name) is not None]
        if self.stand_in == "low-rank" and len(given) != 1:
            raise ValueError("replacement='low-rank' needs either rank or keep")
        if self.stand_in != "low-rank" and given:
            raise ValueError(f"{given[0]} goes with replacement='low-rank'; the size of {self.stand_in!r} is fixed")
        return self

    @property
    def stand_in(self) -> Replacement:
        """The replacement, with its default."""
        if self.replacement is not None:
            return self.replacement
        return "mean" if self.rank is None and self.keep is None else "low-rank"

    @property
    def needs_data(self) -> bool:
        return self.stand_in != "nothing"

    @property
    def full_budget(self) -> bool:
        return self.keep == 1


def structure(shape: FFNShape, config: DropConfig) -> SumSpec:
    """No branch; a bias and a linear map as far as the replacement has them."""
    if config.stand_in in ("nothing", "mean"):
        return sum_spec(shape, [], bias=config.stand_in == "mean")
    rank = _rank(shape, config) if config.stand_in == "low-rank" else None
    square = (shape.d_model, shape.d_model)
    linear = DenseSpec(shape=square) if rank is None else LowRankSpec(shape=square, rank=rank)
    return SumSpec(d_model=shape.d_model, linear=linear, bias=True)


def _rank(shape: FFNShape, config: DropConfig) -> int | None:
    """The rank of the map, None for a full one.

    Raises:
        BudgetError: not even rank 1 fits, or the rank is above the width of the model.
    """
    if config.rank is not None:
        if config.rank > shape.d_model:
            raise BudgetError(f"rank={config.rank} is above d_model={shape.d_model}, the rank of a full map")
        return config.rank
    assert config.keep is not None
    left = keep_budget(shape, config.keep) - shape.d_model
    if left >= shape.d_model**2:
        return None
    rank = left // (2 * shape.d_model)
    if rank < 1:
        smallest = 3 * shape.d_model / shape.parameters
        raise BudgetError(
            f"keep={config.keep} leaves no rank for the map of d_model={shape.d_model}; the smallest reachable keep is "
            f"{smallest:.4f} (or replacement: mean, which stores a bias alone)"
        )
    return rank


@method(
    "drop",
    summary="remove the whole FFN: nothing, its mean output, or a (low-rank) linear map takes its place",
    paper="LLM-Drop 2406.15786, FinerCut 2405.18218; the replacements: 2407.16286",
    budget=("keep",),
    as_sum="no branch: the empty sum, a bias, or a linear map and a bias",
    config=DropConfig,
    structure=structure,
)
def drop(data: LayerData, config: DropConfig) -> SumFFN:
    """The replacement, fitted in closed form to the FFN's outputs (and the drift that is to be repaired)."""
    spec = structure(FFNShape.of(data.ffn), config)
    d_model, dtype = data.ffn.d_model, data.ffn.up.dtype
    if not spec.bias:
        return SumFFN(d_model)
    linear, shift = _fitted(data, spec, config.ridge)
    bias = shift if data.ffn.down_bias is None else data.ffn.down_bias.double() + shift
    return SumFFN(d_model, linear=linear, bias=bias.to(dtype))


def _fitted(data: LayerData, spec: SumSpec, ridge: float) -> tuple[Projection | None, Float[Tensor, " d_model"]]:
    """The map, if the structure has one, and the bias that goes with it, float64."""
    tokens, dtype = data.inputs.tokens, data.ffn.up.dtype

    def columns(x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens columns"]:
        one = x.new_ones(x.shape[0], 1)
        return one if spec.linear is None else torch.cat([one, x], dim=1)

    sums = data.refit_sums(columns)
    y_sum = sums.cross[0]
    if spec.linear is None:
        return None, y_sum / tokens
    moments = (sums.gram[1:, 1:], sums.cross[1:], sums.gram[0, 1:], y_sum, tokens)
    if isinstance(spec.linear, LowRankSpec):
        a, b, shift = affine_reduced_rank_fit(*moments, spec.linear.rank, ridge)
        return LowRank(a.to(dtype), b.to(dtype)), shift
    weight, shift = affine_fit(*moments, ridge)
    return Dense(weight.to(dtype)), shift
