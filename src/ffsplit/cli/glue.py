"""``ffsplit glue``: the paper's experiment on a task: fine-tune, compress, fine-tune again, measure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ffsplit.cli import checks, loading, options, tables
from ffsplit.cli.console import print_json, quiet, say
from ffsplit.cli.progress import reporting
from ffsplit.errors import RecipeError

if TYPE_CHECKING:
    from ffsplit.pipeline.load import Source
    from ffsplit.pipeline.recipe import Recipe
    from ffsplit.tasks.examples import TaskData
    from ffsplit.train.movement import Movement

RECIPE = "prune"
TaskName = Annotated[
    str | None,
    typer.Option("--task", help="cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli; any name with --columns."),
]
TaskFiles = Annotated[
    str,
    typer.Option(
        "--data",
        help="Folder with train, dev and test files (.tsv, .csv, .jsonl, .parquet), 'hub', or a dataset id.",
        metavar="DIR|hub|ID",
        show_default=False,
    ),
]
Columns = Annotated[
    str | None,
    typer.Option("--columns", help="Names, or numbers where files have no header.", metavar="TEXT[,TEXT],LABEL"),
]
Regression = Annotated[bool, typer.Option("--regression", help="The label is a number to predict.")]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe", "--method", help=f"A method, a preset, or a .yaml file. [default: {RECIPE}]", metavar="NAME|FILE"
    ),
]
Keep = Annotated[float | None, typer.Option("--keep", help="Budget: share of the FFN parameters that stay.")]
Bits = Annotated[float | None, typer.Option("--bits", help="Budget: stored bits per FFN weight, all counted.")]
Student = Annotated[
    str | None,
    typer.Option(
        "--student",
        help="Fine-tune this compressed checkpoint of MODEL (made by compress and recover) instead of compressing.",
        metavar="DIR",
        show_default=False,
    ),
]
Masks = Annotated[
    bool,
    typer.Option("--masks", help="Learn which neurons stay during the second fine-tuning, instead of a recipe."),
]
Epochs = Annotated[float, typer.Option("--epochs", help="Passes over the training part, before and after.")]
Rate = Annotated[float, typer.Option("--lr", help="Peak learning rate.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Examples per step.")]
Seeds = Annotated[str, typer.Option("--seeds", "--seed", help="Numbers, separated by commas.", metavar="N,N,...")]
Distill = Annotated[
    float, typer.Option("--distill", help="Weight of the dense model's outputs in the recovery's loss, 0 to 1.")
]
Hidden = Annotated[float, typer.Option("--hidden", help="Weight of its hidden states there (one more forward a step).")]
Precision = Annotated[str, typer.Option("--precision", help="Of training: float32, tf32 or bfloat16.")]
SeqLen = Annotated[int, typer.Option("--seq-len", min=8, help="Tokens per example at most.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Training examples that the compression looks at.")]
Limit = Annotated[int | None, typer.Option("--limit", min=2, help="Train on so many examples, drawn at random.")]

PRECISIONS = ("float32", "tf32", "bfloat16")


def glue(
    model: options.Model,
    data: TaskFiles,
    out: options.Out,
    task: TaskName = None,
    columns: Columns = None,
    regression: Regression = False,
    recipe: RecipeName = None,
    keep: Keep = None,
    bits: Bits = None,
    student: Student = None,
    masks: Masks = False,
    epochs: Epochs = 3.0,
    lr: Rate = 5e-5,
    batch: Batch = 32,
    seeds: Seeds = "0",
    distill: Distill = 0.5,
    hidden: Hidden = 0.0,
    precision: Precision = "float32",
    seq_len: SeqLen = 128,
    samples: Samples = 2048,
    limit: Limit = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Fine-tune an encoder on a task, compress its FFNs, fine-tune what is left, and measure all three.

    Compression is calibrated on the task's own training texts; the recovery learns from labels and from the fine-tuned
    dense model. --student starts it from a checkpoint that was compressed and recovered before, --masks chooses neurons
    while it trains. A killed run goes on where it stopped when the same command is repeated.
    """
    checks.check_model_name(model)
    checks.check_writable(out.absolute())
    numbers = seed_numbers(seeds)
    if precision not in PRECISIONS:
        raise RecipeError(f"--precision {precision!r}: must be one of {', '.join(PRECISIONS)}")
    checks.check_budget(keep, bits)
    _check_way(recipe, keep, bits, student, masks=masks)
    place = checks.torch_device(device)
    with quiet(), reporting() as report:
        source = loading.source(model)
        read = _data(task, columns, data, limit, regression=regression)
        from ffsplit.tasks.finetune import TuneSettings
        from ffsplit.tasks.run import GlueJob, run_glue

        settings: dict[str, Any] = {"epochs": epochs, "lr": lr, "batch_size": batch, "precision": precision}
        job = GlueJob(
            source, read, _way(recipe, keep, bits, student, masks=masks), TuneSettings(**settings),
            TuneSettings(**settings, distill=distill, hidden=hidden), out, numbers, place, seq_len, samples, report,
        )  # fmt: skip
        sizes = ", ".join(f"{name} {facts['examples']:,}" for name, facts in read.describe().items())
        say(f"{read.task.name}: {sizes} examples")
        result = run_glue(job)
    if as_json:
        print_json(result)
    else:
        show(result)


def seed_numbers(words: str) -> tuple[int, ...]:
    """Distinct seeds out of ``0,1,2``.

    Raises:
        RecipeError: one is no number from 0 to 2^31 - 1.
    """
    parts = [part.strip() for part in words.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) < 2**31 for part in parts):
        raise RecipeError(f"--seeds {words!r}: must be whole numbers from 0 on, such as 0,1,2")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _data(task: str | None, columns: str | None, place: str, limit: int | None, *, regression: bool) -> TaskData:
    from ffsplit.tasks.examples import read_task
    from ffsplit.tasks.parts import find_parts
    from ffsplit.tasks.task import task_of

    wanted = task_of(task, columns, regression=regression)
    return read_task(wanted, find_parts(wanted, place), limit)


def _check_way(recipe: str | None, keep: float | None, bits: float | None, student: str | None, *, masks: bool) -> None:
    """Refuse two ways at once, and half of one."""
    if student is not None and (masks or recipe is not None or keep is not None or bits is not None):
        raise RecipeError("--student is compressed already: leave out --recipe, --keep, --bits and --masks")
    if masks and (recipe is not None or bits is not None or keep is None):
        raise RecipeError("--masks needs --keep (share of the FFN parameters that stay), without --recipe or --bits")
    if student is not None:
        checks.check_model_name(student)


def _way(
    recipe: str | None, keep: float | None, bits: float | None, student: str | None, *, masks: bool
) -> Recipe | Source | Movement:
    from ffsplit.pipeline.recipe import load_recipe
    from ffsplit.train.movement import Movement

    if student is not None:
        return loading.source(student)
    if masks:
        assert keep is not None
        return Movement(keep)
    return load_recipe(recipe or RECIPE, keep=keep, bits=bits)


def show(result: dict[str, Any]) -> None:
    """A table of phases and metrics, and where the checkpoints are."""
    summary = result["summary"]
    metrics = list(summary["dense"])
    first = next(iter(result["seeds"].values()))
    rows = [
        (phase, f"{first[phase]['parameters']:,}", *(_spread(summary[phase][name]) for name in metrics))
        for phase in summary
    ]
    title = f"{result['task']}, {len(result['seeds'])} seed(s), metrics times 100"
    tables.show(title, ("phase", "parameters", *metrics), rows, words=1)


def _spread(value: dict[str, float | None]) -> str:
    return f"{value['mean']:.2f}" + ("" if value["sd"] is None else f" ± {value['sd']:.2f}")
