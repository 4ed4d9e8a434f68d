from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffsplit.ops.quantiles import TOLERANCE, Histogram, quantile
from ffsplit.ops.thresholds import neuron_thresholds
from tests.property.amount import examples

SHARES = st.floats(0, 1)
KINDS = st.sampled_from(["normal", "magnitudes", "wide", "ties", "relu"])


def values(kind: str, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, generator=generator)
    return {
        "normal": drawn,
        "magnitudes": drawn.abs(),
        "wide": drawn * 10.0 ** torch.randint(-30, 30, (count,), generator=generator),
        "ties": drawn.round(),
        "relu": drawn.relu(),
    }[kind]


def counted(*chunks: Tensor) -> Histogram:
    histogram = Histogram.zeros()
    for chunk in chunks:
        histogram.add(chunk)
    return histogram


@given(kind=KINDS, count=st.integers(1, 400), share=SHARES, seed=st.integers(0, 2**20))
def test_a_quantile_is_that_of_sorting_up_to_a_bin(kind: str, count: int, share: float, seed: int) -> None:
    data = values(kind, count, seed)
    found = counted(data).quantile(share)
    exact = float(data.sort().values[max(math.ceil(share * count - 1e-9 * count), 1) - 1])
    assert exact <= found <= exact + abs(exact) * 2**-12 + 1e-38
    assert float((data <= found).double().mean()) >= share - 1e-9


@examples(10)
@given(kind=KINDS, seed=st.integers(0, 2**20), share=SHARES)
def test_chunks_count_like_the_whole(kind: str, seed: int, share: float) -> None:
    data = values(kind, 90, seed)
    whole, parts = counted(data), counted(data[:7], data[7:7], data[7:].reshape(1, -1))
    assert torch.equal(whole.counts, parts.counts)
    assert whole.total == 90
    assert whole.quantile(share) == parts.quantile(share)


@given(seed=st.integers(0, 2**20), shares=st.tuples(SHARES, SHARES))
def test_a_larger_share_has_no_smaller_threshold(seed: int, shares: tuple[float, float]) -> None:
    histogram = counted(values("wide", 60, seed))
    assert histogram.quantile(min(shares)) <= histogram.quantile(max(shares))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_share_of_many_values_is_met(share: float) -> None:
    """The accuracy that is promised, on activations that crowd at the minimum of SiLU (the quantile 0.9 is there)."""
    data = torch.nn.functional.silu(values("normal", 200_000, 0) - 1).abs()
    threshold = quantile(lambda: data.split(70_000), share, counted(data))
    assert share <= float((data <= threshold).double().mean()) <= share + TOLERANCE


@given(kind=KINDS, count=st.integers(1, 300), share=SHARES, seed=st.integers(0, 2**20))
def test_two_passes_are_exact(kind: str, count: int, share: float, seed: int) -> None:
    """Every bin of so few values holds too many of them, so the second pass always runs."""
    data = values(kind, count, seed)
    exact = float(data.sort().values[max(math.ceil(share * count - 1e-9 * count), 1) - 1])
    assert quantile(lambda: data.split(50), share, counted(data)) == exact


def test_sixteen_bit_values_are_separated_exactly() -> None:
    data = values("magnitudes", 500, 0).to(torch.bfloat16)
    for share in (0.1, 0.5, 0.9):
        exact = data.float().sort().values[math.ceil(share * 500) - 1]
        assert torch.equal(data.float() <= counted(data).quantile(share), data.float() <= exact)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan"), -float("nan")])
def test_what_is_not_finite_is_noticed(bad: float) -> None:
    edge = torch.finfo(torch.float32).max
    assert counted(torch.tensor([edge, -edge, 0.0, -0.0])).finite
    assert not counted(torch.tensor([1.0, bad])).finite


def test_no_values_have_the_quantile_zero() -> None:
    assert counted().quantile(0.5) == 0.0
    assert counted(torch.zeros(0, 3)).quantile(1.0) == 0.0


def test_zeros_of_both_signs_are_equal() -> None:
    assert counted(torch.tensor([-0.0, -0.0])).quantile(0.1) == counted(torch.tensor([0.0, 0.0])).quantile(0.1)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        counted(torch.ones(1)).quantile(share)


@given(seed=st.integers(0, 2**20), level=st.floats(0, 10))
def test_thresholds_separate_by_weighted_size(seed: int, level: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    weight = torch.rand(6, generator=generator, dtype=torch.float64)
    weight[0] = 0.0
    out = a.abs() <= neuron_thresholds(level, weight)
    assert torch.equal(out[:, 1:], (a.abs() * weight <= level)[:, 1:])
    assert bool(out[:, 0].all())
