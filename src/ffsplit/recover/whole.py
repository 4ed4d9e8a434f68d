"""Stage ``model``: the compressed model learns to give the dense one's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ffsplit.errors import RecipeError
from ffsplit.families.forward import evaluating, without_cache
from ffsplit.ffn.projections import Packed
from ffsplit.kernels.dispatch import exact_products
from ffsplit.recover.config import Recovery
from ffsplit.recover.distillation import Distillation
from ffsplit.recover.guide import Guide, guided
from ffsplit.recover.lora import adaptable, adapted
from ffsplit.recover.packed import trained_packed
from ffsplit.recover.text import Sample, Text
from ffsplit.recover.weights import all_parameters, branch_parameters, in_float32, sums_of, training_only
from ffsplit.recover.workers import Workers
from ffsplit.train.loop import Hooks, Precision, TrainSettings, autocast, train
from ffsplit.train.movement import Movement, NeuronMasks, learned_masks
from ffsplit.train.state import Standing

Progress = Callable[[str, int, int], None]
FLOOR = 0.1
"""Share of the peak learning rate at which the cosine ends."""
SAVE_SECONDS = 30.0
"""Between two states on disk."""


def distil_model(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    text: Text,
    config: Recovery,
    *,
    identity: str = "",
    state: Path | None = None,
    group: Workers | None = None,
    progress: Progress | None = None,
    movement: Movement | None = None,
    dense: int | None = None,
) -> dict[str, Any]:
    """Train a compressed model in place; it ends with the weights of the lowest held-out loss.

    Args:
        student: on the device to train on; its weights may be in 16 bits, masters are kept in float32 meanwhile.
        teacher: the dense model, there too; None trains on the text alone.
        text: what is trained on and what is held out.
        config: what is trained, and how.
        identity: what an interrupted run and its continuation must share.
        state: file that lets a killed run go on.
        group: the processes that train together.
        progress: called with (what, done, total).
        movement: learn masks on the neurons meanwhile, and remove the masked ones at the end; None keeps all.
        dense: FFN parameters that ``movement`` keeps a share of; None: those that the student has.

    Returns:
        losses before and after, steps, seconds: plain values for a report.

    Raises:
        ModelError: the loss is not finite, or the model has no answers to compare.
        RecipeError: nothing can be trained, or there are too few steps for masks.
        BudgetError: the masks' budget cannot be met.
    """
    group = group or Workers()
    settings = settings_of(config, student.device, config.learning_rate, config.steps, config.minutes)
    with ExitStack() as stack:
        stack.enter_context(evaluating(student, *([teacher] if teacher is not None else [])))
        stack.enter_context(exact_products())
        stack.enter_context(without_cache(student))
        masks = stack.enter_context(_masks(student, movement, config.steps, dense))
        trained = stack.enter_context(prepared(student, config))
        loss = Distillation(student, teacher, config, text.batch(0))
        held_out = held_out_loss(text, loss, student.device, settings.precision, group)
        hooks = Hooks(
            score=lambda: -held_out(),
            score_start=True,
            progress=progress if group.first else None,
            label="distil",
            state=state,
            identity=identity,
            reduce=group.reduce if group.count > 1 else None,
            writes=group.first,
            clock=group.clock,
        )
        if masks is not None:
            hooks.before, hooks.counts = masks.before, masks.settled
        batch: Callable[[int], Sample] = text.batch
        if config.guide and teacher is not None and masks is None:
            batch = _guiding(stack.enter_context(guided(student, teacher, _guided_steps(config))), text, config)
        standing = train(student, batch, loss, settings, hooks)
        count = sum(parameter.numel() for parameter in trained.values())
        widths = {} if masks is None else {"widths": masks.widths()}
    stage = "model" if movement is None else "masks"
    return {"stage": stage, **notes_of(standing), "trained_parameters": count, **widths} | _amount(text, config, group)


def _masks(
    student: PreTrainedModel, movement: Movement | None, steps: int, dense: int | None
) -> AbstractContextManager[NeuronMasks | None]:
    return nullcontext() if movement is None else learned_masks(sums_of(student), movement, steps, dense)


def _guided_steps(config: Recovery) -> int:
    return max(1, round(config.guide * config.steps))


def _guiding(guide: Guide, text: Text, config: Recovery) -> Callable[[int], Sample]:
    """The text's batches, of which each sets the guide to its step."""

    def batch(number: int) -> Sample:
        guide.at(number // config.accumulate)
        return text.batch(number)

    return batch


def has_trainables(module: nn.Module, config: Recovery) -> bool:
    """Whether the compressed FFNs in a module hold anything to train without adapters."""
    packed = config.low_bit != "frozen" and any(isinstance(inside, Packed) for inside in module.modules())
    return packed or bool(branch_parameters(module))


def check_trainable(student: nn.Module, config: Recovery) -> None:
    """Refuse a student that has nothing of what the configuration trains.

    Raises:
        RecipeError: it has none, or no matrix that could take adapters of that rank.
    """
    if config.lora is not None:
        adaptable(student, config.lora)
    elif config.train == "ffn" and not has_trainables(student, config):
        raise RecipeError(
            "nothing can be trained: the compressed FFNs hold no floating-point weights; try low_bit=scales or "
            "train=all"
        )


@contextmanager
def prepared(student: nn.Module, config: Recovery) -> Iterator[dict[str, nn.Parameter]]:
    """Float32 masters, factors of scales, adapters: whatever the configuration trains; put back in order afterwards.

    Raises:
        RecipeError: as :func:`check_trainable`.
    """
    check_trainable(student, config)
    with ExitStack() as stack:
        stack.enter_context(in_float32(student))
        if config.low_bit != "frozen" and config.lora is None:
            stack.enter_context(trained_packed(student, codes=config.low_bit == "codes"))
        if config.lora is not None:
            chosen = stack.enter_context(adapted(student, config.lora, config.seed))
        else:
            chosen = all_parameters(student) if config.train == "all" else branch_parameters(student)
        stack.enter_context(training_only(student, chosen))
        yield chosen


def precision_of(config: Recovery, device: torch.device) -> Precision:
    """The precision of products, which follows the device unless it is set."""
    automatic: Precision = "float32" if device.type == "cpu" else "bfloat16"
    return config.precision or automatic


def settings_of(
    config: Recovery, device: torch.device, lr: float, steps: int, minutes: float | None = None
) -> TrainSettings:
    """The loop's settings for one training of a recovery."""
    return TrainSettings(
        steps=steps,
        lr=lr,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip=config.clip,
        seed=config.seed,
        precision=precision_of(config, device),
        evaluate_share=1 / config.evaluations,
        save_seconds=SAVE_SECONDS,
        decay="cosine",
        floor=FLOOR,
        accumulate=config.accumulate,
        minutes=minutes,
        patience=config.patience,
        # The teacher answers without dropout, so that the student's would only blur what it is compared with.
        dropout=False,
    )


def held_out_loss(
    text: Text, loss: Distillation, device: torch.device, precision: Precision, group: Workers
) -> Callable[[], float]:
    """A function that gives the mean loss of the held-out batches."""

    @torch.no_grad()
    def measure() -> float:
        with autocast(device, precision):
            values = [loss(sample) for sample in text.held_out_batches()]
        return group.mean(float(torch.stack(values).float().mean()))

    return measure


def notes_of(standing: Standing) -> dict[str, Any]:
    """What a report says about one training whose score is a held-out loss, negative."""
    assert standing.best is not None
    return {
        "held_out_loss_before": -standing.scores[0][1],
        "held_out_loss": -standing.best,
        "steps": standing.step,
        "best_step": standing.best_step,
        "seconds": round(standing.seconds, 1),
        "held_out_losses": [[step, -score] for step, score in standing.scores],
        "losses": [list(entry) for entry in standing.losses],
    }


def _amount(text: Text, config: Recovery, group: Workers) -> dict[str, int]:
    windows = min(text.batch_size, text.trained_on) * config.accumulate * group.count
    return {
        "windows": text.trained_on,
        "held_out_windows": text.held_out,
        "tokens_per_step": windows * text.windows.seq_len,
    }
