"""Consecutive FFNs that run side by side as one wide FFN: the first holds all neurons, the others give nothing.

This is the step that the planner ``ffn-fusion`` decides on for every FFN of a run. It is no method of its own: whether
FFNs may run side by side is a matter of what lies between them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, model_validator

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN, dense_branch
from ffsplit.ffn.weights import side_by_side
from ffsplit.methods.budgets import dense_branch_spec, sum_spec
from ffsplit.methods.registry import MethodConfig, method


class FusedConfig(MethodConfig):
    """The place of one FFN in its run.

    Attributes:
        members: the run's FFNs by their place in the execution order.
        place: of this FFN in the run; 0 holds the neurons of all.
    """

    method: Literal["fused"] = "fused"
    members: tuple[NonNegativeInt, ...] = Field(min_length=2)
    place: int = Field(ge=0)

    @model_validator(mode="after")
    def _in_the_run(self) -> FusedConfig:
        if self.place >= len(self.members):
            raise ValueError(f"place {self.place} is not in a run of {len(self.members)}")
        return self

    @property
    def needs_data(self) -> bool:
        return False

    @property
    def imitates(self) -> bool:
        return False


def structure(shape: FFNShape, config: FusedConfig) -> SumSpec:
    """The neurons of all members, which have one shape, in the first; nothing in the others."""
    if config.place:
        return SumSpec(d_model=shape.d_model)
    return sum_spec(shape, [dense_branch_spec(shape, shape.d_ff * len(config.members))], bias=shape.down_bias)


@method(
    "fused",
    summary="one FFN of a run that works as one wide FFN",
    paper="FFN Fusion 2503.18908",
    budget=(),
    as_sum="one dense branch of the neurons of a whole run, or nothing",
    config=FusedConfig,
    structure=structure,
    status="experimental",
    alone=False,
)
def fused(data: LayerData, config: FusedConfig) -> SumFFN:
    """Concatenated neurons and added biases: exactly the sum of the members on one input."""
    if config.place:
        return SumFFN(data.ffn.d_model)
    wide = side_by_side([data.ffn, *(data.others[index] for index in config.members[1:])])
    return SumFFN(wide.d_model, [dense_branch(wide)], bias=wide.down_bias)
