"""``ffsplit compress``: the main job, from a model to a checkpoint that loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ffsplit.cli import checks, options
from ffsplit.cli.console import print_json, quiet, say
from ffsplit.cli.progress import reporting
from ffsplit.cli.report import compression_document, show_compression
from ffsplit.cli.resuming import resumable

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
        help="Budget of any kind: keep=0.6, bits=3.2, bytes=80MB, flops=0.6, latency=0.7x@tokens=1.",
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
CacheDir = Annotated[Path | None, typer.Option("--cache-dir", help="Keep activations on disk, below this directory.")]
Measured = Annotated[
    Path | None,
    typer.Option("--measured", help="Keep a planner's measurements here, for other budgets.", metavar="DIR"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of ffsplit.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not reload and compare after saving.")]


def compress(
    model: options.Model,
    out: options.Out,
    recipe: RecipeName = None,
    budget: Budget = None,
    methods: Methods = None,
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
    cache_dir: CacheDir = None,
    measured: Measured = None,
    overwrite: Overwrite = False,
    no_verify: NoVerify = False,
    as_json: options.Json = False,
) -> None:
    """Compress the FFNs of a model and save a checkpoint that transformers loads.

    A killed run goes on where it stopped when the same command is repeated.
    """
    checks.check_output(out, overwrite=overwrite)
    checks.check_budget(keep, bits, sparsity, budget or ())
    checks.check_model_name(model)
    if cache_dir is not None:
        checks.check_writable(cache_dir.absolute())
    if measured is not None:
        checks.check_writable(measured.absolute())
    weights = checks.torch_dtype(dtype)
    place = checks.torch_device(device)
    asked = {"source": calibration, "field": field, "samples": samples, "seq_len": seq_len, "batch_size": batch_size}
    given = {name: value for name, value in asked.items() if value is not None}
    resolved = recipe_of(
        recipe,
        keep=keep,
        bits=bits,
        sparsity=sparsity,
        budget=budget[0] if budget else None,
        methods=checks.names(methods),
        calibration=given,
        seed=seed,
        fold_norms=fold_norms or None,
    )
    target = out.resolve()
    journal = target.with_name(f"{target.name}.ffsplit-journal")
    with quiet(), reporting() as report, resumable(journal):
        from ffsplit.checkpoint.save import save
        from ffsplit.pipeline.compress import compress as run

        result = run(
            model,
            recipe=resolved,
            device=place,
            dtype=weights,
            journal=journal,
            cache_dir=cache_dir,
            measured=measured,
            progress=report,
        )
        say(f"saving to {out}")
        saved = save(result, out, verify=not no_verify, overwrite=overwrite)
        shutil.rmtree(journal, ignore_errors=True)
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
