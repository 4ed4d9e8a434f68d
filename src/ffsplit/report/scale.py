"""Axes of a chart: from values to places, and where round numbers lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_ROUND = (1.0, 2.0, 2.5, 5.0, 10.0)
_LOG_FROM_RATIO = 2.5


@dataclass(frozen=True)
class Scale:
    """A map from ``[low, high]`` to ``[start, end]``, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where a value lies."""
        low, high = self._inner(self.low), self._inner(self.high)
        share = (self._inner(value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """About ``count`` round values inside the range."""
        return _log_ticks(self.low, self.high, count) if self.log else _linear_ticks(self.low, self.high, count)

    def _inner(self, value: float) -> float:
        return math.log10(value) if self.log else value


def scale_for(values: Sequence[float], start: float, end: float, *, zero: bool = False, log: bool = False) -> Scale:
    """A scale with some room around the values.

    Args:
        values: finite; at least one.
        start: where the low end lies.
        end: where the high end lies.
        zero: begin at 0.
        log: logarithmic if all values are positive and the largest is a few times the smallest.
    """
    low, high = min(values), max(values)
    if log and low > 0 and high / low > _LOG_FROM_RATIO:
        room = (high / low) ** 0.08
        return Scale(low / room, high * room, start, end, log=True)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    low = 0.0 if zero else low - room
    return Scale(low, high + room, start, end)


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks as text, with as few digits as tell them apart."""
    labels: list[str] = []
    for digits in range(6, 16):
        labels = [f"{tick:,.{digits}g}".replace("e+0", "e").replace("e+", "e") for tick in ticks]
        if len(set(labels)) == len(labels):
            break
    return labels


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in _ROUND if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) <= count + 1:
            break
    every = math.ceil(len(inside) / (count + 1))
    return inside[::every] if len(inside) > 1 else _linear_ticks(low, high, count)
