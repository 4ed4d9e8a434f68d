"""Hashes, bucket means and backfitting against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffsplit.ops.lookup import backfit, buckets, hyperplanes, shrunken_means


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(tables: Tensor, index: Tensor) -> Tensor:
    return sum(table[index[:, number]] for number, table in enumerate(tables))  # type: ignore[return-value]


@given(seed=st.integers(0, 99), bits=st.integers(1, 5), tables=st.integers(1, 4), tokens=st.integers(0, 9))
def test_buckets_are_the_signs_as_binary_numbers(seed: int, bits: int, tables: int, tokens: int) -> None:
    projected = draws(seed, tokens, tables * bits)
    index = buckets(projected, bits)
    assert index.shape == (tokens, tables)
    for token in range(tokens):
        for table in range(tables):
            signs = [int(projected[token, table * bits + bit] > 0) for bit in range(bits)]
            assert int(index[token, table]) == sum(sign * 2**bit for bit, sign in enumerate(signs))


@given(seed=st.integers(0, 99), shrink=st.floats(0, 9), tokens=st.integers(0, 30))
def test_means_of_buckets(seed: int, shrink: float, tokens: int) -> None:
    residual = draws(seed, tokens, 3)
    bucket = torch.randint(0, 4, (tokens,), generator=torch.Generator().manual_seed(seed))
    found = shrunken_means(residual, bucket, 5, shrink)
    for row in range(5):
        mine = residual[bucket == row]
        wanted = mine.sum(0) / (len(mine) + shrink) if len(mine) + shrink > 0 else torch.zeros(3).double()
        torch.testing.assert_close(found[row], wanted)


@given(seed=st.integers(0, 99), shrink=st.sampled_from([0.0, 0.5, 5.0]), tables=st.integers(1, 4))
def test_backfitting_never_gets_worse(seed: int, shrink: float, tables: int) -> None:
    targets = draws(seed, 60, 3)
    index = torch.randint(0, 8, (60, tables), generator=torch.Generator().manual_seed(seed))
    before = float(targets.square().sum())
    for sweeps in range(1, 6):
        made = backfit(targets, index, 8, shrink, sweeps)
        now = float((targets - fitted(made, index)).square().sum() + shrink * made.square().sum())
        assert now <= before * (1 + 1e-9)
        before = now


@pytest.mark.parametrize(("seed", "shrink"), [(0, 0.5), (1, 5.0)])
def test_many_sweeps_are_the_ridge_regression_on_the_buckets(seed: int, shrink: float) -> None:
    targets = draws(seed, 80, 2)
    index = torch.randint(0, 4, (80, 3), generator=torch.Generator().manual_seed(seed))
    columns = torch.nn.functional.one_hot(index, 4).flatten(1).double()
    wanted = torch.linalg.solve(columns.T @ columns + shrink * torch.eye(12), columns.T @ targets)
    found = backfit(targets, index, 4, shrink, 400).flatten(0, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_hyperplanes() -> None:
    def drawn(spread: Tensor | None = None) -> Tensor:
        return hyperplanes(500, 4, torch.Generator().manual_seed(0), spread)

    torch.testing.assert_close(drawn().norm(dim=1), torch.ones(500).double())
    assert torch.equal(drawn(), drawn())
    stretched = drawn(torch.diag(torch.tensor([10.0, 1.0, 1.0, 0.0])))
    assert float(stretched[:, 0].abs().mean()) > 0.8 > float(drawn()[:, 0].abs().mean())
    assert not stretched[:, 3].any()
    assert not drawn(torch.zeros(4, 4)).any()
