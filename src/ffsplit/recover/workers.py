"""Several processes, one device each, started by ``accelerate launch``; a single process needs no such library."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ffsplit.errors import RecipeError


@dataclass(frozen=True)
class Workers:
    """This process among those that train together.

    Attributes:
        rank: of this one, from 0.
        count: of all.
        state: accelerate's; None for a single process.
        device: that accelerate gave this process; None for a single process.
    """

    rank: int = 0
    count: int = 1
    state: Any = None
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        """Whether this one writes files and reports."""
        return self.rank == 0

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average gradients over the processes."""
        accelerate = importlib.import_module("accelerate.utils")
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = accelerate.reduce(parameter.grad, reduction="mean")

    def mean(self, value: float) -> float:
        """The mean of a number over the processes."""
        if self.count == 1:
            return value
        accelerate = importlib.import_module("accelerate.utils")
        return float(accelerate.reduce(torch.tensor(value, device=self.device), reduction="mean"))

    def clock(self) -> float:
        """The first process's seconds, so that all of them stop at the same step."""
        if self.count == 1:
            return time.monotonic()
        accelerate = importlib.import_module("accelerate.utils")
        seconds = torch.tensor(time.monotonic(), dtype=torch.float64, device=self.device)
        return float(accelerate.broadcast(seconds))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.state is not None:
            self.state.wait_for_everyone()


def workers(device: torch.device | None = None) -> Workers:
    """The processes of this run, as ``accelerate launch`` (or ``torchrun``) started them.

    Args:
        device: that was asked for; ``cpu`` keeps several processes off the accelerators.

    Raises:
        RecipeError: there are several, and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Workers()
    try:
        accelerate = importlib.import_module("accelerate")
    except ImportError as error:
        raise RecipeError("several processes need the library accelerate; pip install ffsplit[recover]") from error
    state = accelerate.PartialState(cpu=device is not None and device.type == "cpu")
    return Workers(state.process_index, state.num_processes, state, state.device)
