"""Taking times in turns, so that a drift of the machine's clock or of its other load falls on all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

Clock = Callable[[], float]
Measure = Callable[[], float]


def interleave(measures: Sequence[Measure], rounds: int, warmup: int = 0) -> list[list[float]]:
    """The results of every measure, taken in turns: A B C, C B A, A B C ...; those of the warm-up are dropped."""
    results: list[list[float]] = [[] for _ in measures]
    for number in range(-warmup, rounds):
        order = range(len(measures)) if number % 2 == 0 else reversed(range(len(measures)))
        for index in order:
            seconds = measures[index]()
            if number >= 0:
                results[index].append(seconds)
    return results


def medians(measures: Sequence[Measure], rounds: int, warmup: int = 0) -> list[float]:
    """The median result of every measure, taken in turns."""
    return [median(times) for times in interleave(measures, rounds, warmup)]


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given; the CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
