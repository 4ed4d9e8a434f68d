"""Shapley values by sampling: what each part of a model is worth, averaged over the company it may be in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch


def shapley_values(
    players: Sequence[int], cost: Callable[[Collection[int]], float], permutations: int, generator: torch.Generator
) -> dict[int, float]:
    """The mean rise in cost when a player leaves, over random orders of leaving.

    Every second order is the reverse of the one before it, which halves most of the noise: an early leaver of one is a
    late leaver of the other.

    Args:
        players: who may leave.
        cost: of a set of players having left; asked for the empty set too.
        permutations: orders that are sampled, >= 1.
        generator: of the orders.

    Returns:
        A value a player; their sum is exactly the cost of all leaving less that of none.

    Reference: Castro et al., Polynomial calculation of the Shapley value based on sampling, 2009; for blocks of a
        model, arXiv 2407.16286.
    """
    totals = dict.fromkeys(players, 0.0)
    order: list[int] = []
    for number in range(permutations):
        if number % 2:
            order = order[::-1]
        else:
            order = [players[place] for place in torch.randperm(len(players), generator=generator).tolist()]
        before = cost([])
        for place, player in enumerate(order):
            after = cost(order[: place + 1])
            totals[player] += after - before
            before = after
    return {player: total / permutations for player, total in totals.items()}
