"""Methods of block-diagonal factors: what the budget buys, and what the fit gains."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffsplit.errors import BudgetError
from ffsplit.ffn.projections import BlockDenseSpec, MonarchSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.blockwise import BlockStructure, blockwise_branch_spec
from ffsplit.methods.registry import get_method, method_config
from tests.unit.test_statistics import layer, make_ffn, make_inputs

KINDS: tuple[BlockStructure, ...] = ("block-dense", "monarch")
SMOLLM = FFNShape(576, 1536, gated=True)


def plan(name: str, shape: FFNShape = SMOLLM, **settings: object) -> SumSpec:
    return get_method(name).plan(shape, method_config({"method": name, **settings}))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_every_matrix_gets_its_share(name: str, blocks: int) -> None:
    spec = plan(name, keep=0.5, blocks=blocks)
    share = 0.5 * SMOLLM.parameters / 3
    assert [projection.blocks for projection in spec.projections] == [blocks] * 3  # type: ignore[union-attr]
    assert all(0.93 * share < projection.parameters < 1.07 * share for projection in spec.projections)
    assert 0.98 * 0.5 * SMOLLM.parameters < spec.parameters <= 0.5 * SMOLLM.parameters


@given(
    kind=st.sampled_from(KINDS),
    shape=st.builds(
        FFNShape, d_model=st.integers(1, 40), d_ff=st.integers(1, 60), gated=st.booleans(), up_bias=st.booleans(),
        down_bias=st.booleans(),
    ),
    heavy=st.integers(0, 20),
    blocks=st.integers(1, 50),
    budget=st.integers(0, 8000),
)  # fmt: skip
def test_a_rank_more_is_a_rank_too_many(
    kind: BlockStructure, shape: FFNShape, heavy: int, blocks: int, budget: int
) -> None:
    heavy = min(heavy, shape.d_ff - 1)
    fixed = heavy * shape.neuron_parameters + shape.d_model * shape.down_bias
    try:
        branch = blockwise_branch_spec(kind, shape, heavy, blocks, budget)
    except BudgetError as error:
        smallest = float(str(error).split("smallest reachable keep is ")[1].split()[0])
        assert smallest * shape.parameters > budget - 1e-4 * shape.parameters
        return
    assert branch.neurons == shape.d_ff - heavy
    spent = fixed + branch.bias_parameters + sum(projection.parameters for projection in branch.projections)
    assert spent <= budget
    down = branch.down
    assert isinstance(down, BlockDenseSpec | MonarchSpec)
    height = down.height if isinstance(down, MonarchSpec) else down.shape[0]
    rank = down.rank if isinstance(down, MonarchSpec) else down.rank // down.blocks
    assert 1 <= rank <= min(down.width, height)
    if rank < min(down.width, height):
        assert spent + down.parameters // rank > budget


@pytest.mark.parametrize("name", KINDS)
def test_without_text_where_none_is_asked_for(name: str) -> None:
    config = method_config({"method": name, "keep": 0.6, "blocks": 2, "sweeps": 0, "refit": False})
    assert not config.needs_data
    ffn = make_ffn(8, 24)
    module = get_method(name).apply(layer(ffn, []), config)
    assert module.spec == plan(name, FFNShape.of(ffn), keep=0.6, blocks=2)
    assert method_config({"method": name, "keep": 0.6, "refit": False}).needs_data
    assert method_config({"method": name, "keep": 0.6, "sweeps": 0}).needs_data


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("gated", [True, False])
@torch.no_grad()
def test_sweeps_and_the_refit_lower_the_error_on_text(name: str, gated: bool) -> None:
    ffn = make_ffn(8, 24, gated=gated)
    inputs = [x @ torch.linalg.matrix_power(torch.eye(8) + 0.5, 2) for x in make_inputs(60, 80, d_model=8)]
    x = torch.cat(inputs)

    def error(**settings: object) -> float:
        config = method_config({"method": name, "keep": 0.7, "blocks": 2, "ridge": 1e-6, **settings})
        module: SumFFN = get_method(name).apply(layer(ffn, inputs), config)
        return float((module(x) - ffn(x)).norm())

    plain, swept, refitted = error(sweeps=0, refit=False), error(refit=False), error()
    assert swept < plain
    assert refitted < swept


def test_one_block_is_whitened_svd() -> None:
    """Same structure, same budget, same function, up to the ridge that the sweeps take."""
    ffn, inputs = make_ffn(8, 24), make_inputs(60, 80, d_model=8)
    whitened = get_method("whitened-svd").apply(
        layer(ffn, inputs), method_config({"method": "whitened-svd", "keep": 0.6})
    )
    for name in KINDS:
        config = method_config({"method": name, "keep": 0.6, "blocks": 1})
        module = get_method(name).apply(layer(ffn, inputs), config)
        assert [p.rank for p in module.spec.projections[:2]] == [p.rank for p in whitened.spec.projections[:2]]  # type: ignore[union-attr]
        for mine, theirs in zip(module.branches, whitened.branches, strict=True):
            torch.testing.assert_close(mine.up.dense(), theirs.up.dense(), rtol=1e-2, atol=1e-2)
