"""An FFN without some of its biases, all other numbers as they were.

This is the step that the planner ``bias-prune`` decides on. It is no method of its own: whether a bias may go is a
matter of measuring.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN, dense_branch
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods.budgets import dense_branch_spec, sum_spec
from ffsplit.methods.registry import MethodConfig, method


class UnbiasConfig(MethodConfig):
    """Which biases go.

    Attributes:
        up: those of `up` and `gate`.
        down: that of `down`.
    """

    method: Literal["unbias"] = "unbias"
    up: bool = False
    down: bool = False

    @property
    def needs_data(self) -> bool:
        return False

    @property
    def full_budget(self) -> bool:
        return not (self.up or self.down)


def structure(shape: FFNShape, config: UnbiasConfig) -> SumSpec:
    """One dense branch with the biases that stay."""
    left = replace(
        shape,
        up_bias=shape.up_bias and not config.up,
        gate_bias=shape.gate_bias and not config.up,
        down_bias=shape.down_bias and not config.down,
    )
    return sum_spec(left, [dense_branch_spec(left, left.d_ff)], bias=left.down_bias)


def without_biases(ffn: FFNWeights, *, up: bool, down: bool) -> FFNWeights:
    """The FFN without the biases of `up` and `gate`, or without that of `down`."""
    return replace(
        ffn,
        up_bias=None if up else ffn.up_bias,
        gate_bias=None if up else ffn.gate_bias,
        down_bias=None if down else ffn.down_bias,
    )


@method(
    "unbias",
    summary="the FFN without some of its biases",
    paper="Cramming, arXiv 2212.14034 (models without them)",
    budget=(),
    as_sum="one dense branch of all neurons, fewer biases",
    config=UnbiasConfig,
    structure=structure,
    status="experimental",
    alone=False,
)
def unbias(data: LayerData, config: UnbiasConfig) -> SumFFN:
    """The same matrices."""
    left = without_biases(data.ffn, up=config.up, down=config.down)
    return SumFFN(left.d_model, [dense_branch(left)], bias=left.down_bias)
