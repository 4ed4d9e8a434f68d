"""Clusters of equal size: which neurons belong together, for experts that all cost the same."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ffsplit.errors import RecipeError


def cluster_sizes(count: int, clusters: int) -> list[int]:
    """Sizes that differ by one at most and sum to ``count``, the larger ones first."""
    size, larger = divmod(count, clusters)
    return [size + (index < larger) for index in range(clusters)]


def balanced_assignment(cost: Float[Tensor, "points clusters"], sizes: list[int]) -> Int64[Tensor, " points"]:
    """Assign points to clusters of fixed sizes, the cheapest pairs first.

    Points propose to their cheapest cluster that has not turned them down, and a cluster with too many proposals turns
    down the dearest. What results is the assignment that takes the pairs one by one in order of cost as long as there
    is room, found in a few rounds over all points.

    Args:
        cost: of every point in every cluster; equal costs go to the point or cluster with the lower index.
        sizes: of the clusters; their sum is the number of points.

    Reference: Gale and Shapley, College admissions and the stability of marriage, 1962, where both sides rank by cost.
    """
    if sum(sizes) != len(cost):
        raise RecipeError(f"clusters of {sum(sizes)} places in all cannot hold {len(cost)} points exactly")
    room, still_open = torch.tensor(sizes, device=cost.device), cost.clone()
    while True:
        price, choice = still_open.min(dim=1)
        order = price.argsort(stable=True)
        order = order[choice[order].argsort(stable=True)]
        proposals = torch.bincount(choice, minlength=len(sizes))
        first = proposals.cumsum(0) - proposals
        rank = torch.arange(len(cost), device=cost.device) - first[choice[order]]
        refused = order[rank >= room[choice[order]]]
        if not len(refused):
            return choice
        still_open[refused, choice[refused]] = torch.inf


def balanced_kmeans(
    points: Float[Tensor, "points dimensions"], clusters: int, generator: torch.Generator, rounds: int = 20
) -> Int64[Tensor, " points"]:
    """Clusters of equal size (up to one) with a small sum of squared distances to their means.

    Args:
        points: one a row.
        clusters: how many, 1 to the number of points.
        generator: on the CPU; draws the points that the clusters start from.
        rounds: of assignment and averaging, at most.

    Returns:
        The cluster of every point: of all rounds, the assignment with the smallest sum.

    Reference: MoEfication, arXiv 2110.01786, builds its experts by balanced k-means; the greedy assignment is ours.
    """
    if not 1 <= clusters <= len(points):
        raise RecipeError(f"clusters={clusters} is not in 1..{len(points)}, the number of points")
    sizes = cluster_sizes(len(points), clusters)
    wide = points.float()
    centres = wide[torch.randperm(len(points), generator=generator)[:clusters].to(points.device)]
    best, lowest = torch.zeros(len(points), dtype=torch.int64, device=points.device), float("inf")
    for _ in range(rounds):
        labels = balanced_assignment(torch.cdist(wide, centres).square(), sizes)
        total = torch.zeros_like(centres).index_add_(0, labels, wide)
        centres = total / torch.tensor(sizes, device=points.device)[:, None]
        spread = float((wide - centres[labels]).square().sum())
        if spread >= lowest:
            break
        best, lowest = labels, spread
    return best
