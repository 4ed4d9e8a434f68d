"""One training loop: AdamW, warm-up and decay, the best weights kept, restartable at any step.

A step depends on its number and the seed alone (the batch, and the random numbers of dropout), so that a run that was
interrupted and one that was not end at the same weights. A budget in minutes is the exception: it follows the clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
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
Decay = Literal["linear", "cosine"]
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
        evaluate_share: evaluate whenever another such share of the steps, or of the minutes, is used up; 0 does not.
        save_seconds: at least this long between two states on disk.
        decay: how the learning rate falls: ``linear`` to zero, or ``cosine`` to ``floor``.
        floor: share of the peak learning rate at which the cosine ends.
        accumulate: batches whose gradients are averaged before a step.
        minutes: stop after so long; warm-up and decay then follow the clock where that is ahead of the steps.
        patience: stop after so many evaluations in a row without a better score; 0 never does.
        dropout: whether the model drops out at random while it trains.
    """

    steps: int
    lr: float = 5e-5
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    precision: Precision = "float32"
    evaluate_every: int = 0
    evaluate_share: float = 0.0
    save_seconds: float = 30.0
    decay: Decay = "linear"
    floor: float = 0.0
    accumulate: int = 1
    minutes: float | None = None
    patience: int = 0
    dropout: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.lr < 1 or not 0 <= self.warmup <= 1:
            raise RecipeError(
                f"training: steps={self.steps} must be at least 1, lr={self.lr} in (0, 1), "
                f"warmup={self.warmup} in [0, 1]"
            )
        if self.accumulate < 1 or self.patience < 0 or (self.minutes is not None and not self.minutes > 0):
            raise RecipeError(
                f"training: accumulate={self.accumulate} must be at least 1, patience={self.patience} not negative, "
                f"minutes={self.minutes} above 0"
            )


@dataclass
class Hooks:
    """What a training reports to and is judged by.

    Attributes:
        score: of the model as it stands, larger is better; None keeps the last weights.
        score_start: whether the weights before the first step are a candidate for the best ones.
        progress: called with (label, steps done, steps).
        label: of the progress.
        state: file for the state of a run under way. It stays: whoever keeps the result removes it once that is safe.
            None keeps none.
        identity: what an interrupted run and its continuation must share.
        reduce: averages the gradients over processes, when there are several; each trains on batches of its own.
        writes: whether this process writes the state.
        clock: seconds.
        before: called with the number of every step, from 0, before it is done; what it sets may depend on that and on
            the trained parameters alone, so that a run can go on anywhere.
        counts: whether the weights after so many steps may be the best ones; those after the last one must.
    """

    score: Callable[[], float] | None = None
    score_start: bool = False
    progress: Progress | None = None
    label: str = "training"
    state: Path | None = None
    identity: str = ""
    reduce: Callable[[Sequence[nn.Parameter]], None] | None = None
    writes: bool = True
    clock: Callable[[], float] = time.monotonic
    before: Callable[[int], None] | None = None
    counts: Callable[[int], bool] = lambda _steps: True


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
        batch: the n-th batch, from 0; a step takes ``settings.accumulate`` of them.
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
        while not run.ended:
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
    _saved: float = field(init=False)
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = optimizer_for(self.model, self.settings)
        self.device = next(self.model.parameters()).device
        hooks = self.hooks
        found = None
        if hooks.state is not None:
            found = read_state(hooks.state, hooks.identity, self.model, self.optimizer)
        self.standing, self.best = found or (Standing(), {})
        if hooks.score_start and found is None:
            self._evaluate()
        self._saved = hooks.clock()
        self._started = self._saved - self.standing.seconds

    @property
    def ended(self) -> bool:
        """Whether the last step is done, the time is up, or nothing gets better any more."""
        standing, patience = self.standing, self.settings.patience
        stale = bool(patience) and standing.stale >= patience
        return stale or standing.step >= self.settings.steps or self._time_share() >= 1

    def _time_share(self) -> float:
        minutes = self.settings.minutes
        return 0.0 if minutes is None else self.standing.seconds / (60 * minutes)

    def step(self, batch: Callable[[int], B], loss: Callable[[B], Tensor]) -> None:
        number, settings = self.standing.step, self.settings
        torch.manual_seed((settings.seed * 1_000_003 + number) % _LARGEST_SEED)
        self.model.train(settings.dropout)
        if self.hooks.before is not None:
            self.hooks.before(number)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * learning_rate(number, settings, self._time_share())
        value = self._backward(batch, loss, number)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if self.hooks.reduce is not None:
            self.hooks.reduce(parameters)
        nn.utils.clip_grad_norm_(parameters, settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._losses.append(value)
        self.standing.step = number + 1
        self.standing.seconds = self.hooks.clock() - self._started
        self._after_step()

    def _backward(self, batch: Callable[[int], B], loss: Callable[[B], Tensor], number: int) -> Tensor:
        """Gradients of the mean loss over the step's batches, and that loss."""
        count = self.settings.accumulate
        total = torch.zeros((), device=self.device)
        for part in range(count):
            with autocast(self.device, self.settings.precision):
                value = loss(batch(number * count + part)) / count
            value.backward()  # type: ignore[no-untyped-call]
            total = total + value.detach().float()
        return total

    def _after_step(self) -> None:
        step, settings, hooks = self.standing.step, self.settings, self.hooks
        last = self.ended
        due = bool(settings.evaluate_every) and step % settings.evaluate_every == 0
        if self._share_is_up() or last or due:
            self._evaluate()
            last = self.ended
        if hooks.progress is not None:
            hooks.progress(hooks.label, settings.steps if last else step, settings.steps)
        if hooks.state is not None and not last and hooks.clock() - self._saved >= settings.save_seconds:
            self._note_loss()
            if hooks.writes:
                write_state(hooks.state, hooks.identity, self.model, self.optimizer, self.best, self.standing)
            self._saved = hooks.clock()

    def _share_is_up(self) -> bool:
        """Whether another share of the budget was used up since the last evaluation for that reason."""
        share, standing = self.settings.evaluate_share, self.standing
        if not share:
            return False
        used = int(max(standing.step / self.settings.steps, self._time_share()) / share + 1e-9)
        up, standing.shares = used > standing.shares, used
        return up

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
        if not self.hooks.counts(standing.step):
            return
        standing.stale += 1
        if standing.best is None or score > standing.best:
            standing.best, standing.best_step, standing.stale = score, standing.step, 0
            self.best = {name: value.detach().clone() for name, value in trained_parameters(self.model).items()}

    def finish(self) -> Standing:
        load_weights(self.model, self.best)
        self.model.eval()
        return self.standing


def optimizer_for(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices, none on biases and norms."""
    parameters = list(trained_parameters(model).values())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


def learning_rate(step: int, settings: TrainSettings, time_share: float = 0.0) -> float:
    """Share of the peak learning rate at a step, counted from 0.

    Args:
        step: of the step.
        settings: warm-up and decay.
        time_share: how much of the budget in minutes is used up.
    """
    rise = round(settings.warmup * settings.steps)
    if step < rise and time_share < settings.warmup:
        return max((step + 1) / rise, time_share / settings.warmup)
    done = max((step - rise) / max(settings.steps - rise, 1), (time_share - settings.warmup) / (1 - settings.warmup))
    if settings.decay == "linear":
        return max(1 - done, 0.0)
    return settings.floor + (1 - settings.floor) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


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
