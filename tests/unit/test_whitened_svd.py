"""How `whitened-svd` divides its budget over the matrices of one FFN."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ffsplit.errors import BudgetError
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.methods.budgets import keep_budget, low_rank_branch_spec, rank_for, sum_spec
from ffsplit.methods.registry import get_method, method_config

shapes = st.builds(
    FFNShape, d_model=st.integers(8, 64), d_ff=st.integers(8, 99), gated=st.booleans(), up_bias=st.booleans(),
    down_bias=st.booleans(),
)  # fmt: skip


def plan(shape: FFNShape, **settings: float) -> SumSpec:
    return get_method("whitened-svd").plan(shape, method_config({"method": "whitened-svd", **settings}))


@given(shape=shapes, keep=st.floats(0.05, 0.99))
def test_equal_weights_give_the_common_rank(shape: FFNShape, keep: float) -> None:
    try:
        rank = rank_for(shape, 0, keep_budget(shape, keep))
    except BudgetError:
        return
    expected = sum_spec(shape, [low_rank_branch_spec(shape, shape.d_ff, rank)], bias=shape.down_bias)
    assert plan(shape, keep=keep) == expected == plan(shape, keep=keep, rank_up=3, rank_gate=3, rank_down=3)


def test_ranks_follow_their_weights_within_the_same_budget() -> None:
    shape = FFNShape(576, 1536, gated=True, down_bias=True)
    uneven = plan(shape, keep=0.5, rank_up=1.0, rank_gate=0.5, rank_down=1.5)
    up, gate, down = (projection.rank for projection in uneven.branches[0].projections)  # type: ignore[union-attr]
    assert abs(gate - 0.5 * up) <= 1
    assert abs(down - 1.5 * up) <= 2
    assert 0 <= 0.5 * shape.parameters - uneven.parameters < 3 * (576 + 1536)
