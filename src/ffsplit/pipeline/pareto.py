"""The front of a model: load it, and measure once what every budget of one kind would do to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ffsplit.budget.auto import AutoConfig
from ffsplit.budget.survey import survey
from ffsplit.budget.words import Axis, parse_axis, parse_budget
from ffsplit.devices import default_device
from ffsplit.errors import RecipeError
from ffsplit.families.forward import evaluating, without_cache
from ffsplit.kernels.dispatch import exact_products
from ffsplit.pipeline.compress import Progress, load_dense, prepare
from ffsplit.pipeline.decide import _store
from ffsplit.pipeline.journal import Journal
from ffsplit.pipeline.recipe import Recipe, load_recipe, method_named
from ffsplit.provenance import provenance

DEFAULT_KIND = "keep"


def front_of(
    model: str | Path,
    *,
    recipe: Recipe,
    axis: Axis,
    journal: str | Path,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    measured: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure every candidate once and allocate under every budget of a kind.

    Args:
        model: hub id, folder or GGUF file.
        recipe: of :func:`recipe_along`.
        axis: the kind of budget, and budgets that will be carried out.
        journal: directory of a run that may be killed and repeated.
        device: as in :func:`ffsplit.compress`.
        dtype: as in :func:`ffsplit.compress`.
        measured: as in :func:`ffsplit.compress`.
        progress: as in :func:`ffsplit.compress`.

    Returns:
        What :func:`ffsplit.budget.survey.survey` finds, with what it was found on.

    Raises:
        FFSplitError: the input cannot work, or one of the budgets is out of reach.
    """
    assert isinstance(recipe.method, AutoConfig)
    recipes = [load_recipe(recipe, budget=budget) for budget in axis.budgets] or [recipe]
    dense, tokenizer = load_dense(str(model), None, recipes, dtype)
    with evaluating(dense), without_cache(dense), exact_products():
        job = prepare(dense, tokenizer, recipe, recipe.calibration.source, device or default_device(), progress)
        log = Journal(journal, {**job.identity(), "front": True})
        scene = job.scene(_store(job, log, measured), None)
        found = survey(scene, recipe.method, [parse_budget(budget)[1] for budget in axis.budgets])
    made = provenance(seed=recipe.seed, data={"calibration": job.data.sha256})
    return {
        **found,
        "windows": recipe.method.windows,
        "calibration": job.data.describe(),
        "provenance": made | {"model_sha256": job.model_sha256},
    }


def check_auto(recipe: str) -> None:
    """Refuse a recipe that compares no methods, whether or not it has the budget that it needs on its own.

    Raises:
        RecipeError: its method is another one than `auto`, or there is no such recipe.
    """
    name = method_named(recipe)
    if name not in (None, "auto"):
        raise RecipeError(f"--pareto needs the recipe auto, not {name}: only it compares methods")


def recipe_along(recipe: Recipe, budgets: list[str], *, own: bool) -> tuple[Recipe, Axis]:
    """The recipe and the axis of a front.

    Args:
        recipe: of the planner `auto`.
        budgets: that were asked for, in words; all of one kind.
        own: without any, whether to take the kind of the recipe's own budget; else it is ``keep``.

    Raises:
        RecipeError: budgets that have no front.
    """
    assert isinstance(recipe.method, AutoConfig)
    axis = parse_axis(budgets or [recipe.method.budget if own else DEFAULT_KIND])
    return load_recipe(recipe, budget=axis.loose), axis
