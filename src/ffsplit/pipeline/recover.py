"""Recovering a stored checkpoint: load it and its dense model, train, and give a result that can be saved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from ffsplit.calibrate.tokens import TokenWindows
from ffsplit.devices import device_of
from ffsplit.errors import CheckpointError, RecipeError
from ffsplit.families import find_ffns
from ffsplit.methods.registry import explain
from ffsplit.pipeline.compress import Progress, compress, refuse_compressed
from ffsplit.pipeline.job import budget_of, linear_parameters
from ffsplit.pipeline.load import open_source
from ffsplit.pipeline.plan import Plan
from ffsplit.pipeline.recipe import ALL_NEURONS, Recipe, load_recipe
from ffsplit.pipeline.result import PLAN_FILE, RECIPE_FILE, REPORT_FILE, CompressionResult
from ffsplit.provenance import provenance
from ffsplit.recover.config import Recovery
from ffsplit.recover.run import check_masks, check_possible, recover_model
from ffsplit.recover.text import recovery_windows
from ffsplit.recover.weights import specs_of, sums_of

TextInput = str | Path | Sequence[str] | Tensor | TokenWindows


def recover(
    directory: str | Path,
    teacher: str | Path | PreTrainedModel | None = None,
    *,
    data: TextInput | None = None,
    recovery: Recovery | dict[str, Any] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    journal: str | Path | None = None,
    progress: Progress | None = None,
) -> CompressionResult:
    """Train a compressed checkpoint to be closer to its dense model. Structure and storages stay what they are.

    The stage ``masks`` alone makes FFNs narrower, those of a dense model too.

    Args:
        directory: that :func:`ffsplit.save` wrote; if the first stage is ``masks``, a dense model will do: hub id,
            folder or GGUF file. It is then its own teacher.
        teacher: the dense model: hub id, folder, GGUF file or a loaded one. None trains a language model on the text
            alone.
        data: text; None takes the recovery's, or the text that the checkpoint was calibrated on.
        recovery: stages and settings.
        device: to train on; None means an accelerator if there is one.
        dtype: of the result's weights; None keeps the stored one.
        journal: directory that lets a killed run go on.
        progress: called with (what, done, total).

    Returns:
        the recovered model; its report has what was done under ``recovery``.

    Raises:
        CheckpointError: the directory holds no checkpoint of ffsplit's.
        FFSplitError: the input cannot work; raised before training wherever that is possible.
    """
    folder = Path(directory)
    settings, place = recovery_of(recovery), device_of(device)
    if settings.stages[0] == "masks" and not (folder / PLAN_FILE).is_file():
        return _from_dense(str(directory), teacher, data, settings, device, dtype, journal, progress)
    check_possible(settings, teacher is not None)
    plan, recipe, report = stored_result(folder)
    check_possible(settings, teacher is not None, unlike=recipe.unlike_dense)
    dense_source = None if teacher is None or isinstance(teacher, PreTrainedModel) else open_source(str(teacher))
    if dense_source is not None:
        refuse_compressed(dense_source.config, dense_source.name)
    source = open_source(str(folder))
    tokenizer = source.tokenizer() or (None if dense_source is None else dense_source.tokenizer())
    model = source.load(dtype)
    settings, data = _with_text(settings, data, recipe)
    windows = recovery_windows(model, tokenizer, settings, data, recipe.calibration.source)
    plan = located(plan, model)
    check_masks(settings, {ffn.name: ffn.spec for ffn in plan.ffns}, plan.dense_parameters)
    sizes = _dense_sizes(model, plan)
    dense = teacher if dense_source is None else dense_source.load(dtype)
    notes = recover_model(
        model,
        dense,  # type: ignore[arg-type]
        windows,
        settings,
        tokenizer=tokenizer,
        device=place,
        folder=None if journal is None else Path(journal),
        progress=progress,
        dense=plan.dense_parameters,
    )
    made = provenance(seed=settings.seed, data={"recovery": windows.sha256})
    report = {**report, "recovery": {**notes, "provenance": made}}
    if "masks" in settings.stages:
        plan = plan.with_specs(specs_of(model))
        report["budget"] = budget_of(plan, *sizes)
    return CompressionResult(model, plan, recipe.model_copy(update={"recovery": settings}), report, tokenizer)


def _from_dense(
    name: str,
    teacher: str | Path | PreTrainedModel | None,
    data: TextInput | None,
    settings: Recovery,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    journal: str | Path | None,
    progress: Progress | None,
) -> CompressionResult:
    """Start from all neurons of a dense model: pruning that keeps them all, and this recovery after it.

    Raises:
        RecipeError: the teacher is another model.
    """
    if teacher is not None and str(teacher) != name:
        raise RecipeError(f"{name} is a dense model, which is its own teacher here: leave the teacher out")
    return compress(
        name,
        recipe={**ALL_NEURONS, "recovery": settings.model_dump(exclude_unset=True), "seed": settings.seed},
        calibration=data if data is not None else settings.source,  # type: ignore[arg-type]
        field=settings.field,
        samples=1,  # nothing is fitted
        seq_len=settings.seq_len if "seq_len" in settings.model_fields_set else None,
        device=device,
        dtype=dtype,
        journal=journal,
        progress=progress,
    )


def _dense_sizes(model: PreTrainedModel, plan: Plan) -> tuple[int, int]:
    """Parameters of all linear layers of the dense model but its output head, and of all of it; of dense branches."""
    inside = sum(module.spec.parameters for module in sums_of(model).values())
    removed, gone = plan.dense_parameters - plan.parameters, plan.attention
    linear = linear_parameters(model) + inside + removed + sum(one.linear_parameters for one in gone)
    stored = sum(parameter.numel() for parameter in model.parameters())
    return linear, stored + removed + sum(one.parameters for one in gone)


def _with_text(settings: Recovery, data: TextInput | None, recipe: Recipe) -> tuple[Recovery, TextInput | None]:
    """Settings that name their text, and text that has no name."""
    if isinstance(data, str | Path):
        return settings.model_copy(update={"source": str(data)}), None
    if data is None and settings.source is None and settings.field is None:
        # The text of the fit, which is read as it was then.
        settings = settings.model_copy(update={"field": recipe.calibration.field})
    return settings, data


def recovery_of(values: Recovery | dict[str, Any] | None) -> Recovery:
    """Settings from plain values.

    Raises:
        RecipeError: an unknown key, or a value out of range.
    """
    if isinstance(values, Recovery):
        return values
    try:
        return Recovery.model_validate(values or {})
    except ValidationError as error:
        raise RecipeError(explain(error, Recovery, "recovery")) from error


def stored_result(folder: Path) -> tuple[Plan, Recipe, dict[str, Any]]:
    """Plan, recipe and report beside the weights of a checkpoint.

    Raises:
        CheckpointError: they are not there, or damaged.
    """
    for name in (PLAN_FILE, RECIPE_FILE, REPORT_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no {name}: only what `ffsplit compress` wrote can be recovered")
    try:
        plan = Plan.model_validate_json((folder / PLAN_FILE).read_text(encoding="utf-8"))
        recipe = load_recipe(folder / RECIPE_FILE)
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecipeError) as error:
        raise CheckpointError(f"{folder}: plan, recipe or report are damaged: {error}") from error
    return plan, recipe, report


def located(plan: Plan, model: PreTrainedModel) -> Plan:
    """The plan with the places of FFNs as the loaded model has them: one stored plainly knows its new widths only."""
    if sums_of(model):
        return plan
    sites = {site.name: site.to_dict() for site in find_ffns(model).sites}
    if missing := [ffn.name for ffn in plan.ffns if ffn.name not in sites]:
        raise CheckpointError(f"the plan names the FFN {missing[0]}, which {type(model).__name__} does not have")
    here = tuple(ffn.model_copy(update={"site": sites[ffn.name]}) for ffn in plan.ffns)
    return plan.model_copy(update={"ffns": here})
