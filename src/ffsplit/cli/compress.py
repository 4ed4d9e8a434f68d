"""``ffsplit compress``: the main job, from a model to a checkpoint that loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ffsplit.cli import checks, options
from ffsplit.cli.console import print_json, quiet, say
from ffsplit.cli.ours import FRONT, MARK
from ffsplit.cli.pareto import write_front
from ffsplit.cli.progress import reporting
from ffsplit.cli.report import compression_document, show_compression
from ffsplit.cli.resuming import resumable
from ffsplit.cli.run import Run

if TYPE_CHECKING:
    from ffsplit.pipeline.recipe import Recipe

RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="A method, a preset, or a .yaml file.",
        metavar="NAME|FILE",
        show_default="ffsplit; auto with --budget or --methods",
    ),
]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        help="Budget of any kind: keep=0.6, bits=3.2, bytes=80MB, flops=0.6, latency=0.7x@tokens=1. With --pareto "
        "several of one kind, each for a checkpoint of its own, or a kind alone.",
        metavar="KIND=VALUE",
    ),
]
Methods = Annotated[
    str | None, typer.Option("--methods", help="What the recipe auto chooses from, layer by layer.", metavar="A,B,...")
]
Keep = Annotated[float | None, typer.Option("--keep", help="Budget: share of the FFN parameters that stay.")]
Bits = Annotated[float | None, typer.Option("--bits", help="Budget: stored bits per FFN weight, all counted.")]
Sparsity = Annotated[float | None, typer.Option("--sparsity", help="Budget: share of work left out at run time.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of everything random.")]
FoldNorms = Annotated[bool, typer.Option("--fold-norms", help="First fold norm weights into what they feed (exact).")]
CentreNorms = Annotated[
    bool, typer.Option("--centre-norms", help="Then take out of FFN outputs what LayerNorms subtract anyway (exact).")
]
CacheDir = Annotated[Path | None, typer.Option("--cache-dir", help="Keep activations on disk, below this directory.")]
Measured = Annotated[
    Path | None,
    typer.Option("--measured", help="Keep a planner's measurements here, for other budgets.", metavar="DIR"),
]
Pareto = Annotated[
    bool, typer.Option("--pareto", help="Measure once; write the front of damage over cost: table, JSON, plot.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of ffsplit.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not reload and compare after saving.")]


def compress(
    model: options.Model,
    out: options.Out,
    recipe: RecipeName = None,
    budget: Budget = None,
    methods: Methods = None,
    pareto: Pareto = False,
    keep: Keep = None,
    bits: Bits = None,
    sparsity: Sparsity = None,
    calibration: options.Source = None,
    field: options.Field = None,
    samples: options.Samples = None,
    seq_len: options.SeqLen = None,
    batch_size: options.BatchSize = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: Seed = None,
    fold_norms: FoldNorms = False,
    centre_norms: CentreNorms = False,
    cache_dir: CacheDir = None,
    measured: Measured = None,
    overwrite: Overwrite = False,
    no_verify: NoVerify = False,
    as_json: options.Json = False,
) -> None:
    """Compress the FFNs of a model and save a checkpoint that transformers loads.

    A killed run goes on where it stopped when the same command is repeated.
    """
    checks.check_output(out, overwrite=overwrite, mark=FRONT if pareto else MARK)
    checks.check_budget(keep, bits, sparsity, budget or (), front=pareto)
    checks.check_model_name(model)
    for folder in (cache_dir, measured):
        if folder is not None:
            checks.check_writable(folder.absolute())
    place, weights = checks.torch_device(device), checks.torch_dtype(dtype)
    asked = {"source": calibration, "field": field, "samples": samples, "seq_len": seq_len, "batch_size": batch_size}
    if pareto and recipe is not None:
        from ffsplit.pipeline.pareto import check_auto

        check_auto(recipe)
    resolved = recipe_of(
        recipe or ("auto" if pareto else None),
        keep=keep,
        bits=bits,
        sparsity=sparsity,
        budget=budget[0] if budget and not pareto else None,
        methods=checks.names(methods),
        calibration={name: value for name, value in asked.items() if value is not None},
        seed=seed,
        fold_norms=fold_norms or None,
        centre_norms=centre_norms or None,
    )
    run = Run(model, out, place, weights, cache_dir, measured, verify=not no_verify, overwrite=overwrite)
    if pareto:
        write_front(run, resolved, budget or [], own=recipe not in (None, "auto"), as_json=as_json)
    else:
        _compress(run, resolved, as_json=as_json)


def _compress(run: Run, recipe: Recipe, *, as_json: bool) -> None:
    with quiet(), reporting() as report, resumable(run.journal):
        result = run.compressed(recipe, run.journal, report)
        say(f"saving to {run.out}")
        saved = run.save(result, run.out, overwrite=run.overwrite)
        shutil.rmtree(run.journal, ignore_errors=True)
    if as_json:
        print_json(compression_document(result, saved))
    else:
        show_compression(result, saved)


def recipe_of(name: str | None, **asked: Any) -> Recipe:
    """The recipe with the command line's values on top, its text already tried."""
    from ffsplit.pipeline.recipe import load_recipe

    recipe = load_recipe(name, **asked)
    checks.check_text(recipe.calibration.source, recipe.calibration.field, "calibration")
    return recipe
