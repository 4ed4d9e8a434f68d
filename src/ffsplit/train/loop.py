"""One training loop: AdamW, linear warm-up and decay, the best weights kept, restartable at any step.

A step depends on its number and the seed alone (the batch, and the random numbers of dropout), so that a run that was
interrupted and one that was not end at the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from ffsplit.errors import ModelError, RecipeError
from ffsplit.train.state import Standing, Tensors, load_weights, read_state, trained_parameters, write_state

Progress = Callable[[str, int, int], None]
Precision = Literal["float32", "tf32", "bfloat16"]
B = TypeVar("B")
_LARGEST_SEED = 2**31


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        steps: optimizer steps.
        lr: peak learning rate.
        warmup: share of the steps over which the learning rate rises; it then falls linearly to zero.
        weight_decay: decoupled, on matrices only.
        clip: largest norm of the gradient.
        seed: of dropout.
        precision: ``float32``; ``tf32``, float32 with products in TensorFloat-32 where the device has it; or
            ``bfloat16`` under autocast, weights in float32.
        evaluate_every: steps between two evaluations; the last step always ends with one.
        save_seconds: at least this long between two states on disk.
    """

    steps: int
    lr: float = 5e-5
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    precision: Precision = "float32"
    evaluate_every: int = 0
    save_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.lr < 1 or not 0 <= self.warmup <= 1:
            raise RecipeError(
                f"training: steps={self.steps} must be at least 1, lr={self.lr} in (0, 1), "
                f"warmup={self.warmup} in [0, 1]"
            )


@dataclass
class Hooks:
    """What a training reports to and is judged by.

    Attributes:
        score: of the model as it stands, larger is better; None keeps the last weights.
        progress: called with (label, steps done, steps).
        label: of the progress.
        state: file for the state of a run under way; removed at the end. None keeps none.
        identity: what an interrupted run and its continuation must share.
    """

    score: Callable[[], float] | None = None
    progress: Progress | None = None
    label: str = "training"
    state: Path | None = None
    identity: str = ""


def train(
    model: nn.Module,
    batch: Callable[[int], B],
    loss: Callable[[B], Tensor],
    settings: TrainSettings,
    hooks: Hooks | None = None,
) -> Standing:
    """Train the parameters of a model that require gradients; it ends in eval mode with its best weights.

    Args:
        model: on any device.
        batch: what step number n, from 0, trains on.
        loss: a scalar of a batch, computed through ``model``.
        settings: how.
        hooks: evaluation, progress and restart.

    Returns:
        where the training ended: losses, scores, the best step.

    Raises:
        ModelError: the loss is not finite.
        ResumeError: there is a state of another training.
    """
    run = _Run(model, settings, hooks or Hooks())
    with precise(settings.precision):
        while run.standing.step < settings.steps:
            run.step(batch, loss)
    return run.finish()


@dataclass
class _Run:
    """One training under way."""

    model: nn.Module
    settings: TrainSettings
    hooks: Hooks
    optimizer: torch.optim.Optimizer = field(init=False)
    standing: Standing = field(init=False)
    best: Tensors = field(init=False)
    device: torch.device = field(init=False)
    _losses: list[Tensor] = field(default_factory=list)
    _saved: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.optimizer = optimizer_for(self.model, self.settings)
        self.device = next(self.model.parameters()).device
        hooks = self.hooks
        found = None
        if hooks.state is not None:
            found = read_state(hooks.state, hooks.identity, self.model, self.optimizer)
        self.standing, self.best = found or (Standing(), {})

    def step(self, batch: Callable[[int], B], loss: Callable[[B], Tensor]) -> None:
        number, settings = self.standing.step, self.settings
        torch.manual_seed((settings.seed * 1_000_003 + number) % _LARGEST_SEED)
        if not self.model.training:
            self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * learning_rate(number, settings)
        with autocast(self.device, settings.precision):
            value = loss(batch(number))
        value.backward()  # type: ignore[no-untyped-call]
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._losses.append(value.detach())
        self.standing.step = number + 1
        self._after_step()

    def _after_step(self) -> None:
        step, settings, hooks = self.standing.step, self.settings, self.hooks
        last = step == settings.steps
        if last or (settings.evaluate_every and step % settings.evaluate_every == 0):
            self._evaluate()
        if hooks.progress is not None:
            hooks.progress(hooks.label, step, settings.steps)
        if hooks.state is not None and not last and time.monotonic() - self._saved >= settings.save_seconds:
            self._note_loss()
            write_state(hooks.state, hooks.identity, self.model, self.optimizer, self.best, self.standing)
            self._saved = time.monotonic()

    def _note_loss(self) -> None:
        """Look at the losses now and then only: each look waits for the device."""
        if not self._losses:
            return
        mean = float(torch.stack(self._losses).float().mean())
        self._losses.clear()
        if not math.isfinite(mean):
            raise ModelError(
                f"{self.hooks.label}: the loss is not finite at step {self.standing.step}; try a smaller --lr"
            )
        self.standing.losses.append((self.standing.step, mean))

    def _evaluate(self) -> None:
        self._note_loss()
        if self.hooks.score is None:
            return
        score, standing = self.hooks.score(), self.standing
        standing.scores.append((standing.step, score))
        if standing.best is None or score > standing.best:
            standing.best, standing.best_step = score, standing.step
            self.best = {name: value.detach().clone() for name, value in trained_parameters(self.model).items()}

    def finish(self) -> Standing:
        load_weights(self.model, self.best)
        self.model.eval()
        if self.hooks.state is not None:
            self.hooks.state.unlink(missing_ok=True)
        return self.standing


def optimizer_for(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices, none on biases and norms."""
    parameters = list(trained_parameters(model).values())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Share of the peak learning rate at a step, counted from 0."""
    rise = round(settings.warmup * settings.steps)
    if step < rise:
        return (step + 1) / rise
    return (settings.steps - step) / max(settings.steps - rise, 1)


def autocast(device: torch.device, precision: Precision) -> torch.autocast | nullcontext[None]:
    """Bfloat16 products where that is the precision asked for."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


@contextmanager
def precise(precision: Precision) -> Iterator[None]:
    """Float32 products in TensorFloat-32 inside, if that is asked for and the device has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
