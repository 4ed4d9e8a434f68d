"""The stages of a recovery, one after the other, each restartable."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ffsplit.calibrate.devices import moved_to
from ffsplit.calibrate.tokens import TokenWindows
from ffsplit.errors import RecipeError
from ffsplit.families.forward import evaluating
from ffsplit.ffn.spec import SumSpec
from ffsplit.kernels.dispatch import exact_products
from ffsplit.provenance import hash_model
from ffsplit.recover.blocks import distil_layer
from ffsplit.recover.config import Recovery, Stage
from ffsplit.recover.distillation import Distillation
from ffsplit.recover.layers import Tour, Work, summary
from ffsplit.recover.lora import require_peft
from ffsplit.recover.refit import refit_layer
from ffsplit.recover.store import Store
from ffsplit.recover.text import Text, recovery_text
from ffsplit.recover.weights import as_sums, same_structure, sums_of
from ffsplit.recover.whole import check_trainable, distil_model, precision_of
from ffsplit.recover.workers import Workers, workers
from ffsplit.train.masked import keep_neurons
from ffsplit.train.movement import budgets_for

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Scene:
    """What every stage works with.

    Attributes:
        student: the compressed model, on the device.
        teacher: the dense model, there too; None when there is none.
        text: to train on, and held out.
        config: what to do.
        store: where finished and half-finished work is kept; None keeps nothing.
        group: the processes that train together.
        progress: called with (what, done, total).
        dense: FFN parameters of the dense model; None: those that the student came with.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    text: Text
    config: Recovery
    store: Store | None
    group: Workers
    progress: Progress | None
    dense: int | None


def recover_model(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    windows: TokenWindows,
    config: Recovery,
    *,
    tokenizer: Any | None = None,
    device: torch.device,
    folder: Path | None = None,
    progress: Progress | None = None,
    dense: int | None = None,
) -> dict[str, Any]:
    """Recover a compressed model in place: same structure, same storages, better numbers.

    The stage ``masks`` alone changes the structure: it leaves narrower FFNs.

    Args:
        student: its FFNs are sums, or plain and narrower than the teacher's.
        teacher: the dense model; may be None for the stage ``model`` of a language model.
        windows: of text.
        config: stages and settings.
        tokenizer: names the mask token of a masked language model.
        device: to train on; both models go there, and home again.
        folder: where a killed run finds its work; None keeps none.
        progress: called with (what, done, total).
        dense: FFN parameters that the stage ``masks`` keeps a share of; None: those that the student has.

    Returns:
        notes of every stage, as plain values.

    Raises:
        RecipeError: nothing can be trained, or a stage needs a teacher.
        DataError: too little text.
        ModelError: a loss is not finite, the models do not fit together, or FFNs are not dense where masks are wanted.
        BudgetError: the stage ``masks`` cannot meet its budget.
        ResumeError: the folder holds another run.
    """
    check_possible(config, teacher is not None)
    group = workers(device)
    device = group.device or device
    check_masks(config, {name: module.spec for name, module in as_sums(student).items()}, dense)
    mask_id = None if tokenizer is None else getattr(tokenizer, "mask_token_id", None)
    special = () if tokenizer is None else tuple(tokenizer.all_special_ids)
    text = recovery_text(student, windows, config, mask_id, special, (group.rank, group.count))
    parts = _identity(student, teacher, windows, config) | {
        "processes": group.count,
        "precision": precision_of(config, device),
    }
    with moved_to(device, [student] if teacher is None else [student, teacher]):
        _check_training(student, teacher, text, config)
        store = None if folder is None else Store(folder, parts, group.first)
        scene = Scene(student, teacher, text, config, store, group, progress, dense)
        notes = [_stage(scene, stage) for stage in config.stages]
    return {"recipe": config.model_dump(mode="json"), "text": _text_record(windows), "stages": notes}


def check_possible(config: Recovery, has_teacher: bool, *, unlike: str | None = None) -> None:
    """Refuse what no model could do.

    Args:
        config: stages and settings.
        has_teacher: whether there is a dense model.
        unlike: why the compressed FFNs do not stand for the dense one's, each at its place, if they do not.

    Raises:
        RecipeError: a stage needs a dense model and there is none, or FFNs to compare one by one; a library is missing.
    """
    needy = [stage for stage in config.stages if stage in ("refit", "blocks")]
    if needy and not has_teacher:
        raise RecipeError(f"stage {needy[0]} compares every FFN with its dense original: give the teacher")
    if unlike is not None and (needy or config.guide):
        what = f"stage {needy[0]}" if needy else "guide"
        raise RecipeError(
            f"{what} puts every FFN beside the one at its place in the dense model, but {unlike}: use the "
            "stages model and masks alone, without guide"
        )
    if config.guide and not has_teacher:
        raise RecipeError("guide mixes in the dense model's FFNs: give the teacher")
    if config.lora is not None:
        require_peft()


def check_masks(config: Recovery, specs: Mapping[str, SumSpec], dense: int | None) -> None:
    """Refuse masks that could not be learned or carried out, if the stage ``masks`` is wanted.

    Args:
        config: stages and settings.
        specs: of the FFNs that the recovery starts with.
        dense: FFN parameters that stay in part; None: those of the specs.

    Raises:
        ModelError: an FFN is not dense.
        BudgetError: the budget leaves an FFN no neuron, or is above what there is.
        RecipeError: there are too few steps.
    """
    if "masks" in config.stages:
        config.movement.window(config.steps)
        budgets_for(specs, config.movement, dense)


def _check_training(student: PreTrainedModel, teacher: PreTrainedModel | None, text: Text, config: Recovery) -> None:
    """Refuse models that the stages ``model`` and ``masks`` could not train, before a folder is taken.

    Raises:
        RecipeError: nothing can be trained.
        DataError: the two models' answers cannot be compared.
        ModelError: there is no teacher, and the student answers nothing that text could judge.
    """
    if "model" in config.stages or "masks" in config.stages:
        check_trainable(student, config)
        with evaluating(student, *([] if teacher is None else [teacher])), exact_products():
            Distillation(student, teacher, config, text.batch(0))


def _stage(scene: Scene, stage: Stage) -> dict[str, Any]:
    """One stage, or what it left when it was finished in an earlier run."""
    store, masks = scene.store, stage == "masks"
    shape = functools.partial(_narrow, scene.student) if masks else None
    if store is not None and (notes := store.finished(stage, scene.student, shape)) is not None:
        return notes
    with nullcontext() if masks else same_structure(scene.student):
        notes = _STAGES[stage](scene)
    scene.group.wait()
    if store is not None:
        store.finish(stage, scene.student, notes)
    return notes


def _narrow(student: PreTrainedModel, notes: dict[str, Any]) -> None:
    """Give the FFNs the widths that the notes of the stage ``masks`` tell of; which neurons is of no matter."""
    for name, module in sums_of(student).items():
        keep_neurons(module, torch.arange(notes["widths"][name], device=student.device))


def _whole(scene: Scene, stage: Stage = "model") -> dict[str, Any]:
    store = scene.store
    return distil_model(
        scene.student,
        scene.teacher,
        scene.text,
        scene.config,
        identity="" if store is None else store.identity,
        state=None if store is None else store.state(stage),
        group=scene.group,
        progress=scene.progress,
        movement=scene.config.movement if stage == "masks" else None,
        dense=scene.dense,
    )


def _blocks(scene: Scene) -> dict[str, Any]:
    store = scene.store
    state = None if store is None else store.state
    identity = "" if store is None else store.identity
    return _layerwise(scene, "blocks", distil_layer(scene.config, identity, state, scene.group))


def _refit(scene: Scene) -> dict[str, Any]:
    return _layerwise(scene, "refit", refit_layer)


def _layerwise(scene: Scene, stage: Stage, work: Work) -> dict[str, Any]:
    assert scene.teacher is not None
    tour = Tour(scene.student, scene.teacher, scene.text, scene.config, scene.store, stage, work, scene.progress)
    return summary(stage, tour.run())


_STAGES: dict[Stage, Callable[[Scene], dict[str, Any]]] = {
    "refit": _refit,
    "blocks": _blocks,
    "masks": functools.partial(_whole, stage="masks"),
    "model": _whole,
}


def _identity(
    student: PreTrainedModel, teacher: PreTrainedModel | None, windows: TokenWindows, config: Recovery
) -> dict[str, Any]:
    return {
        "recovery": config.model_dump(mode="json"),
        "model": hash_model(student),
        "teacher": None if teacher is None else hash_model(teacher),
        "text": windows.sha256,
    }


def _text_record(windows: TokenWindows) -> dict[str, Any]:
    return {
        "source": windows.name,
        "sha256": windows.sha256,
        "samples": windows.samples,
        "seq_len": windows.seq_len,
        "tokens": windows.tokens,
    }
