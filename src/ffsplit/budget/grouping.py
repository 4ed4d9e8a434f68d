"""Which layers share: runs of equal FFNs, cut into groups from fine to coarse until the budget allows a cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

from ffsplit.errors import BudgetError, RecipeError
from ffsplit.ffn.shape import FFNShape

Group = tuple[int, ...]
"""FFNs by their place in the execution order; the first owns the weights."""
Partition = list[Group]


def runs(
    shapes: Sequence[FFNShape], protect_first: int, protect_last: int, stacks: Sequence[str] | None = None
) -> list[Group]:
    """The longest stretches of consecutive FFNs of one shape and one stack of layers, two at least.

    Args:
        shapes: of all FFNs.
        protect_first: FFNs at the start that stay as they are.
        protect_last: FFNs at the end that stay as they are.
        stacks: a name for the layer list of every FFN; None takes all for one.

    Raises:
        RecipeError: there is none, so nothing can be shared.
    """
    found: list[list[int]] = []
    for index in range(protect_first, len(shapes) - protect_last):
        before = found[-1][-1] if found else None
        alike = before == index - 1 and shapes[before] == shapes[index]
        if alike and before is not None and (stacks is None or stacks[before] == stacks[index]):
            found[-1].append(index)
        else:
            found.append([index])
    if long := [tuple(run) for run in found if len(run) > 1]:
        return long
    raise RecipeError(
        f"no two consecutive FFNs of equal shape are left to share among {len(shapes)} FFNs with "
        f"protect_first={protect_first} and protect_last={protect_last}"
    )


def consecutive(found: Sequence[Group], size: int | None) -> Iterator[Partition]:
    """Every run cut into groups of ``size``, or of 2, then of 3, and so on; what is left over makes a smaller group."""
    for step in range(2, max(map(len, found)) + 1) if size is None else (size,):
        yield [run[start : start + step] for run in found for start in range(0, len(run), step)]


def merged(found: Sequence[Group], size: int | None, similarity: Callable[[int, int], float]) -> Iterator[Partition]:
    """Neighbouring groups merged one by one, always those whose layers resemble their owner-to-be the most.

    Args:
        found: runs; groups of different runs are never merged.
        size: the most FFNs of a group.
        similarity: of two FFNs.
    """
    groups: list[list[Group]] = [[(index,) for index in run] for run in found]
    while True:
        options = [
            (sum(similarity(left[0], index) for index in right) / len(right), run, place)
            for run, inside in enumerate(groups)
            for place, (left, right) in enumerate(pairwise(inside))
            if size is None or len(left) + len(right) <= size
        ]
        if not options:
            return
        _, run, place = max(options, key=lambda option: option[0])
        groups[run][place : place + 2] = [groups[run][place] + groups[run][place + 1]]
        yield [group for inside in groups for group in inside]


def choose(
    partitions: Iterable[Partition],
    stored: Callable[[Partition, int], int],
    budget: int,
    dense: int,
    limits: tuple[int, int],
) -> tuple[Partition, int]:
    """The first partition that the budget allows, and the most that still fits of what is spent on its groups.

    Args:
        partitions: in the order of preference.
        stored: FFN parameters of the whole model for a partition and an amount (a rank of differences, a number of
            neurons), which every further one raises alike.
        budget: the most of them.
        dense: those of the dense model, for the message.
        limits: the least and the most amount to think of.

    Raises:
        BudgetError: none fits even with the least amount.
    """
    least, most = limits
    smallest = dense
    for partition in partitions:
        needed = stored(partition, least)
        smallest = min(smallest, needed)
        if needed > budget:
            continue
        step = stored(partition, least + 1) - needed
        return partition, least if not step else min(most, least + (budget - needed) // step)
    raise BudgetError(
        f"keep is out of reach by sharing these layers; the smallest reachable keep is {smallest / dense:.4f} (larger "
        "groups, fewer protected layers, a smaller rank or tie: all reach lower)"
    )
