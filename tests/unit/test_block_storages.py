"""Block-dense and Monarch projections: the forward is the matrix, at any size, and only what is counted is stored."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ffsplit.ffn.projections import BlockDense, BlockDenseSpec, Monarch, MonarchSpec, Projection, empty_projection
from ffsplit.kernels.block_diagonal import block_diagonal
from ffsplit.ops.block_factors import whole_blocks

CPU = torch.device("cpu")


@st.composite
def projections(draw: st.DrawFn) -> Projection:
    """Any size, divisible or not, with random numbers everywhere, where blocks are filled up too."""
    rows, columns, rank = draw(st.integers(1, 13)), draw(st.integers(1, 13)), draw(st.integers(0, 3))
    blocks = whole_blocks(columns, min(draw(st.integers(1, 5)), rows))
    spec: Any
    if draw(st.booleans()):
        spec = BlockDenseSpec(shape=(rows, columns), blocks=blocks, rank=rank * blocks)
    else:
        spec = MonarchSpec(shape=(rows, columns), blocks=blocks, rank=rank)
    module = empty_projection(spec, torch.float64, CPU)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


@given(module=projections(), leading=st.sampled_from([(), (4,), (2, 3), (0,), (2, 0)]))
@torch.no_grad()
def test_the_forward_is_the_matrix(module: Projection, leading: tuple[int, ...]) -> None:
    rows, columns = module.spec.shape
    x = torch.randn(*leading, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = module.dense()
    assert weight.shape == (rows, columns)
    found = module(x)
    assert found.shape == (*leading, rows)
    torch.testing.assert_close(found, x @ weight.T, rtol=1e-10, atol=1e-10)


@given(module=projections())
def test_what_is_counted_is_what_is_stored(module: Projection) -> None:
    assert module.spec.parameters == sum(p.numel() for p in module.parameters()) == module.spec.macs
    assert module.spec.stored_bits(16) == 16 * module.spec.parameters
    other = empty_projection(module.spec, torch.float64, CPU)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.dense(), module.dense())
    assert torch.equal(copy.deepcopy(module).dense(), module.dense())
    assert module.dense(torch.float32).dtype == torch.float32


@given(module=projections())
@torch.no_grad()
def test_what_fills_blocks_up_has_no_effect(module: Projection) -> None:
    spec, before = module.spec, module.dense()
    missing = spec.blocks * spec.width - spec.shape[1]
    if missing:
        stack = module.b if isinstance(module, BlockDense) else module.first
        stack[-1, :, spec.width - missing :] = 1e6  # type: ignore[index,operator]
    if isinstance(module, Monarch):
        for block in range(spec.blocks):
            module.second[block, len(range(block, spec.shape[0], spec.blocks)) :] = 1e6
    assert torch.equal(module.dense(), before)
    x = torch.ones(3, spec.shape[1], dtype=torch.float64)
    torch.testing.assert_close(module(x), x @ before.T, rtol=1e-10, atol=1e-10)


def test_block_dense_is_the_product_of_its_factors() -> None:
    a, b = torch.randn(5, 6, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    module = BlockDense(11, a, b)
    torch.testing.assert_close(module.dense().detach(), (a @ torch.block_diag(*b))[:, :11])


def test_monarch_is_the_product_of_its_factors_and_shuffles() -> None:
    """Both shuffles as explicit permutations: a transpose of what is read as a table, block by block."""
    first, second = torch.randn(3, 6, 4, dtype=torch.float64), torch.randn(3, 2, 6, dtype=torch.float64)

    def shuffle(rows: int, columns: int) -> torch.Tensor:
        return torch.eye(rows * columns, dtype=torch.float64)[
            torch.arange(rows * columns).reshape(rows, columns).T.flatten()
        ]

    whole = shuffle(3, 2) @ torch.block_diag(*second) @ shuffle(3, 6) @ torch.block_diag(*first)
    torch.testing.assert_close(Monarch((6, 12), first, second).dense().detach(), whole)
    torch.testing.assert_close(Monarch((5, 10), first, second).dense().detach(), whole[:5, :10])


def test_monarch_is_stored_as_the_checkpoint_page_says() -> None:
    blocks, rank, rows, columns = 3, 2, 7, 11
    first, second = torch.randn(3, 6, 4, dtype=torch.float64), torch.randn(3, 3, 6, dtype=torch.float64)
    found = Monarch((rows, columns), first, second).dense().detach()
    for row, column in product(range(rows), range(columns)):
        (h, j), (i, c) = divmod(row, blocks), divmod(column, 4)
        expected = sum(second[j, h, k * blocks + i] * first[i, j * rank + k, c] for k in range(rank))
        torch.testing.assert_close(found[row, column], expected)


def test_the_batched_product_is_that_of_the_block_diagonal_matrix() -> None:
    weight, x = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(5, 2, 12, dtype=torch.float64)
    torch.testing.assert_close(block_diagonal(x, weight).flatten(-2), x @ torch.block_diag(*weight).T)
    torch.testing.assert_close(
        block_diagonal(x[..., :10], weight).flatten(-2), x[..., :10] @ torch.block_diag(*weight)[:, :10].T
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_full_graph_and_dtype(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    modules = [
        BlockDense(10, torch.randn(7, 6, generator=generator), torch.randn(3, 2, 4, generator=generator)),
        Monarch((7, 10), torch.randn(3, 6, 4, generator=generator), torch.randn(3, 3, 6, generator=generator)),
    ]
    x = torch.randn(2, 3, 10, generator=generator).to(dtype)
    for module in modules:
        module.to(dtype)
        torch.compiler.reset()
        found = torch.compile(module, backend="eager", fullgraph=True)(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found, module(x))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (BlockDenseSpec, {"shape": (4, 10), "blocks": 7, "rank": 7}),
        (BlockDenseSpec, {"shape": (4, 10), "blocks": 11, "rank": 11}),
        (BlockDenseSpec, {"shape": (4, 10), "blocks": 0, "rank": 2}),
        (BlockDenseSpec, {"shape": (4, 10), "blocks": 2, "rank": 3}),
        (BlockDenseSpec, {"shape": (4, 10), "blocks": 2, "rank": -2}),
        (MonarchSpec, {"shape": (4, 10), "blocks": 5, "rank": 1}),
        (MonarchSpec, {"shape": (9, 10), "blocks": 7, "rank": 1}),
        (MonarchSpec, {"shape": (9, 10), "blocks": 2, "rank": -1}),
    ],
    ids=str,
)
def test_impossible_structures_are_refused(kind: Any, values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind(**values)
