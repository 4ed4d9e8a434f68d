from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffsplit.errors import RecipeError
from ffsplit.ops.clustering import balanced_assignment, balanced_kmeans, cluster_sizes


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spread(points: Tensor, labels: Tensor) -> float:
    return sum(
        float((points[labels == c] - points[labels == c].mean(0)).square().sum()) for c in labels.unique().tolist()
    )


@given(count=st.integers(1, 60), seed=st.integers(0, 2**20), data=st.data())
def test_clusters_have_the_promised_sizes(count: int, seed: int, data: st.DataObject) -> None:
    clusters = data.draw(st.integers(1, count))
    labels = balanced_kmeans(torch.randn(count, 3, generator=seeded(seed)), clusters, seeded(seed))
    sizes = cluster_sizes(count, clusters)
    assert torch.bincount(labels, minlength=clusters).tolist() == sizes
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1


@given(points=st.integers(1, 25), clusters=st.integers(1, 6), seed=st.integers(0, 2**20))
def test_an_assignment_takes_the_cheapest_pairs_first(points: int, clusters: int, seed: int) -> None:
    """Against the loop over all pairs in order of cost."""
    clusters = min(clusters, points)
    cost = torch.rand(points, clusters, generator=seeded(seed))
    room, expected = cluster_sizes(points, clusters), [-1] * points
    for pair in cost.flatten().argsort().tolist():
        point, cluster = divmod(pair, clusters)
        if expected[point] < 0 and room[cluster]:
            expected[point] = cluster
            room[cluster] -= 1
    assert balanced_assignment(cost, cluster_sizes(points, clusters)).tolist() == expected


def test_equal_points_are_shared_out() -> None:
    labels = balanced_kmeans(torch.zeros(7, 2), 3, seeded(0))
    assert torch.bincount(labels).tolist() == [3, 2, 2]


@given(seed=st.integers(0, 50))
def test_separate_groups_are_found_from_some_start(seed: int) -> None:
    groups = torch.arange(4).repeat(5)
    points = torch.eye(4)[groups] * 10 + torch.randn(20, 4, generator=seeded(seed)) * 0.1
    best = min(spread(points, balanced_kmeans(points, 4, seeded(start))) for start in range(12))
    assert best == pytest.approx(spread(points, groups))


@given(seed=st.integers(0, 2**20), clusters=st.integers(2, 6))
def test_more_rounds_are_not_worse(seed: int, clusters: int) -> None:
    points = torch.randn(30, 4, generator=seeded(seed))
    spreads = [spread(points, balanced_kmeans(points, clusters, seeded(seed), rounds)) for rounds in (1, 2, 5, 20)]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(spreads))


def test_the_seed_decides() -> None:
    points = torch.randn(40, 4, generator=seeded(0))
    assert torch.equal(balanced_kmeans(points, 5, seeded(1)), balanced_kmeans(points, 5, seeded(1)))


@pytest.mark.parametrize("clusters", [0, 6])
def test_a_wrong_number_of_clusters_is_refused(clusters: int) -> None:
    with pytest.raises(RecipeError, match=f"clusters={clusters}"):
        balanced_kmeans(torch.zeros(5, 2), clusters, seeded(0))


def test_places_must_be_as_many_as_points() -> None:
    with pytest.raises(RecipeError, match="cannot hold 3 points"):
        balanced_assignment(torch.zeros(3, 2), [1, 1])
