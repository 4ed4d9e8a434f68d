"""Which of several results no other one beats."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each point is on the Pareto front when both coordinates are to be small (bytes, perplexity).

    A point is off the front if some other is at least as small in both coordinates and smaller in one; equal points
    share their fate. A point with a coordinate that is not finite is never on it.
    """
    finite = [point if all(map(math.isfinite, point)) else None for point in points]
    return [
        point is not None and not any(_beats(other, point) for other in finite if other is not None) for point in finite
    ]


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other
