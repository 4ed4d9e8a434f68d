from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffsplit.ops.outliers import absorbing_columns, other_columns, remaining_gram, weak_columns
from ffsplit.ops.refine import output_error
from ffsplit.ops.rounding import decode, round_to_nearest
from tests.property.amount import examples

properties = examples(40)


def layer(rows: int, columns: int, seed: int, tokens: int = 80) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x.T @ x


def rounded(weight: Tensor, bits: int = 2) -> Tensor:
    return decode(*round_to_nearest(weight, bits, 8), torch.float64)


@properties
@given(columns=st.integers(1, 30), share=st.floats(0, 1), seed=st.integers(0, 2**20))
def test_columns_are_split_in_two(columns: int, share: float, seed: int) -> None:
    chosen = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))[: round(share * columns)]
    index = chosen.sort().values.to(torch.int32)
    others = other_columns(index, columns)
    assert sorted([*index.tolist(), *others.tolist()]) == list(range(columns))
    assert others.tolist() == sorted(others.tolist())


@properties
@given(rows=st.integers(1, 5), columns=st.integers(2, 20), count=st.integers(0, 20), seed=st.integers(0, 2**20))
def test_the_weakest_columns_are_found(rows: int, columns: int, count: int, seed: int) -> None:
    weight, gram = layer(rows, columns, seed)
    damage = [float(gram[j, j] * (weight - rounded(weight))[:, j].square().sum()) for j in range(columns)]
    worst = sorted(range(columns), key=lambda j: -damage[j])[: min(count, columns)]
    assert weak_columns(weight, rounded(weight), gram, count).tolist() == sorted(worst)
    assert torch.equal(
        weak_columns(weight, rounded(weight), None, count),
        weak_columns(weight, rounded(weight), torch.eye(columns), count),
    )


@properties
@given(rows=st.integers(1, 5), columns=st.integers(2, 20), count=st.integers(1, 19), seed=st.integers(0, 2**20))
def test_absorbing_is_least_squares_and_leaves_what_the_remaining_gram_says(
    rows: int, columns: int, count: int, seed: int
) -> None:
    weight, gram = layer(rows, columns, seed)
    index = (
        torch.randperm(columns, generator=torch.Generator().manual_seed(seed))[: min(count, columns - 1)].sort().values
    )
    others = other_columns(index, columns)
    result = weight.clone()
    result[:, others] = rounded(weight[:, others])
    before = float(output_error(weight, result, gram))
    result[:, index] = absorbing_columns(weight, result[:, others], gram, index, others, 0.0)
    after = float(output_error(weight, result, gram))
    assert after <= before * (1 + 1e-9)
    left = remaining_gram(gram, index, others, 0.0)
    expected = float(output_error(weight[:, others], result[:, others], left))
    assert abs(after - expected) <= 1e-6 * before
    gradient = (result - weight) @ gram[:, index]
    assert float(gradient.abs().max()) <= 1e-6 * float(gram.diagonal().max())


def test_dead_outliers_and_no_data() -> None:
    weight, gram = layer(3, 8, 0)
    index = torch.tensor([1, 4])
    others = other_columns(index, 8)
    gram[index], gram[:, index] = 0.0, 0.0
    assert torch.equal(remaining_gram(gram, index, others, 0.01), gram[others][:, others])
    assert torch.equal(
        absorbing_columns(weight, rounded(weight)[:, others], gram, index, others, 0.01), weight[:, index]
    )
