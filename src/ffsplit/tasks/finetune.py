"""Fine-tuning of a classifier or regressor, alone or with a teacher, and its predictions."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from transformers import PreTrainedModel

from ffsplit.errors import RecipeError
from ffsplit.evaluate.logits import device_of
from ffsplit.families.forward import evaluating
from ffsplit.kernels.dispatch import exact_products
from ffsplit.recover.weights import as_sums
from ffsplit.tasks.encode import Batch, Encoded, Epochs, steps_per_epoch
from ffsplit.tasks.metrics import measure
from ffsplit.tasks.task import Task
from ffsplit.train.distill import hidden_loss, logits_loss
from ffsplit.train.loop import Hooks, Precision, TrainSettings, autocast, precise, train
from ffsplit.train.movement import Movement, learned_masks
from ffsplit.train.state import Standing

EVALUATION_BATCH = 128
SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class TuneSettings:
    """How to fine-tune.

    Attributes:
        epochs: passes over the training part.
        lr: peak learning rate.
        batch_size: examples per step.
        seed: of the new head, the order of the examples and dropout.
        distill: weight of the teacher's outputs in the loss; that of the labels is one minus it. 0 without a teacher.
        temperature: of the teacher's class probabilities.
        hidden: weight of the distance to the teacher's hidden states, which costs its forward in every step.
        precision: of products; see :class:`ffsplit.train.loop.TrainSettings`.
        evaluations: per epoch, on the part that is selected on.
    """

    epochs: float = 3
    lr: float = 5e-5
    batch_size: int = 32
    seed: int = 0
    distill: float = 0.5
    temperature: float = 2.0
    hidden: float = 0.0
    precision: Precision = "float32"
    evaluations: int = 1

    def __post_init__(self) -> None:
        if not (self.epochs > 0 and self.batch_size >= 1 and self.evaluations >= 1 and self.temperature > 0):
            raise RecipeError(
                f"fine-tuning: epochs={self.epochs} and temperature={self.temperature} must be above 0, "
                f"batch_size={self.batch_size} and evaluations={self.evaluations} at least 1"
            )
        if not math.isfinite(self.epochs) or not 0 < self.lr < 1:
            raise RecipeError(f"fine-tuning: epochs={self.epochs} must be finite, lr={self.lr} in (0, 1)")
        if not 0 <= self.distill <= 1 or not 0 <= self.hidden < math.inf:
            raise RecipeError(
                f"distillation: distill={self.distill} must be in [0, 1], hidden={self.hidden} at least 0, finite"
            )


def fine_tune(
    model: PreTrainedModel,
    task: Task,
    data: Encoded,
    select: Encoded,
    settings: TuneSettings,
    *,
    teacher: PreTrainedModel | None = None,
    hooks: Hooks | None = None,
    movement: Movement | None = None,
) -> Standing:
    """Train all floating-point parameters; the weights that score best on ``select`` stay.

    With ``movement`` masks on the neurons are learned meanwhile, and the masked ones are gone afterwards: the FFNs are
    then sums of one narrower dense branch, and the best weights are sought among those that go with the last masks.

    Args:
        model: on any device; compressed FFNs train like any other layer.
        task: says the loss and the score.
        data: to train on, on the model's device.
        select: to select on.
        settings: how.
        teacher: the fine-tuned dense model, on the same device.
        hooks: progress and restart; its ``score`` is replaced, and with masks its ``before`` and ``counts``.
        movement: how many neurons stay and when the others go; None keeps all.

    Raises:
        ModelError: the loss is not finite, or masks are asked for on FFNs that are not dense.
        BudgetError: the masks' budget cannot be met.
        RecipeError: there are too few steps for masks.
    """
    epochs = Epochs(data.lengths, settings.batch_size, settings.seed)
    steps = steps_of(settings, len(data))
    hooks = hooks or Hooks()
    hooks.score = lambda: measure(task, predict(model, select, settings.precision), select.labels.cpu().numpy())[
        task.metrics[0]
    ]
    plan = TrainSettings(
        steps=steps,
        lr=settings.lr,
        seed=settings.seed,
        precision=settings.precision,
        evaluate_every=max(epochs.steps // settings.evaluations, 1),
        save_seconds=SAVE_SECONDS,
    )
    with ExitStack() as stack:
        if movement is not None:
            masks = stack.enter_context(learned_masks(as_sums(model), movement, steps))
            hooks.before, hooks.counts = masks.before, masks.settled
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        loss = _loss(model, task, settings, teacher, data)
        return train(model, lambda step: data.batch(epochs.rows(step)), loss, plan, hooks)


def steps_of(settings: TuneSettings, examples: int) -> int:
    """Optimizer steps over so many examples, at least one."""
    return max(round(settings.epochs * steps_per_epoch(examples, settings.batch_size)), 1)


@torch.no_grad()
def predict(model: PreTrainedModel, data: Encoded, precision: Precision = "float32") -> np.ndarray:
    """The head's outputs ``[examples, outputs]``, float32, in the order of the examples; the mode is restored."""
    batches = data.in_order_of_length(EVALUATION_BATCH)
    outputs: list[Tensor] = []
    with evaluating(model), exact_products(), precise(precision), autocast(device_of(model), precision):
        for rows in batches:
            inputs, _, _ = data.batch(rows)
            outputs.append(model(**inputs).logits.float())
    stacked: np.ndarray = torch.cat(outputs).cpu().numpy()
    return stacked[np.argsort(np.concatenate(batches), kind="stable")]


def scores(model: PreTrainedModel, task: Task, data: Encoded) -> dict[str, float]:
    """The task's metrics times 100, computed in float32."""
    return measure(task, predict(model, data), data.labels.cpu().numpy())


def _loss(
    model: PreTrainedModel, task: Task, settings: TuneSettings, teacher: PreTrainedModel | None, data: Encoded
) -> Callable[[tuple[Batch, Tensor, Tensor]], Tensor]:
    """The loss of a batch. The teacher's outputs are computed once: it sees no dropout."""
    if teacher is None:
        return lambda batch: _label_loss(model(**batch[0]).logits, batch[1], task)
    guide = torch.from_numpy(predict(teacher, data)).to(data.labels.device)

    def distilled(batch: tuple[Batch, Tensor, Tensor]) -> Tensor:
        inputs, labels, rows = batch
        output = model(**inputs, output_hidden_states=settings.hidden > 0)
        known = _label_loss(output.logits, labels, task)
        soft = logits_loss(output.logits, guide[rows], settings.temperature)
        total = (1 - settings.distill) * known + settings.distill * soft
        if settings.hidden > 0:
            assert teacher is not None
            total = total + settings.hidden * _hidden(output, teacher, inputs)
        return total

    return distilled


def _hidden(output: Any, teacher: PreTrainedModel, inputs: Batch) -> Tensor:
    with torch.no_grad():
        wanted = teacher(**inputs, output_hidden_states=True).hidden_states
    return hidden_loss(output.hidden_states[1:], wanted[1:], inputs["attention_mask"])


def _label_loss(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    if task.regression:
        return mse_loss(logits.float().squeeze(-1), labels)
    return cross_entropy(logits.float(), labels)
