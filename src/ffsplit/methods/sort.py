"""Neurons in the order of their importance: the same function, whose first neurons are a narrower FFN."""

from __future__ import annotations

from typing import Literal

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN, dense_branch
from ffsplit.methods.budgets import dense_branch_spec, sum_spec
from ffsplit.methods.neurons import DATA_FREE_SCORES, ScoreName, nested_order
from ffsplit.methods.registry import MethodConfig, method


class SortConfig(MethodConfig):
    """What the order goes by.

    Attributes:
        score: the importance of a neuron. The default asks what removing it alone would cost; orderings that choose
            neurons jointly count on a refit of `down`, which a slice does not get.
    """

    method: Literal["sort"] = "sort"
    score: ScoreName = "output_norm"

    @property
    def needs_data(self) -> bool:
        return self.score not in DATA_FREE_SCORES


def structure(shape: FFNShape, config: SortConfig) -> SumSpec:
    """One dense branch of all neurons."""
    return sum_spec(shape, [dense_branch_spec(shape, shape.d_ff)], bias=shape.down_bias)


@method(
    "sort",
    summary="reorder the neurons by importance, so that every width can be sliced off",
    paper="MatFormer 2310.07707 (the nesting; without its training)",
    budget=(),
    as_sum="one dense branch of all neurons, the most important first",
    config=SortConfig,
    structure=structure,
)
def sort(data: LayerData, config: SortConfig) -> SumFFN:
    """The same sum in another order."""
    return SumFFN(
        data.ffn.d_model, [dense_branch(data.ffn.take(nested_order(data, config.score)))], bias=data.ffn.down_bias
    )
