"""``ffsplit recover``: train a compressed checkpoint, with its dense model as the teacher."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ffsplit.cli import checks, loading, options
from ffsplit.cli.console import print_json, quiet, say
from ffsplit.cli.progress import reporting
from ffsplit.cli.report import budget_facts, loading_lines, show_recovery
from ffsplit.cli.resuming import resumable
from ffsplit.cli.tables import line, show_facts, size
from ffsplit.cli.writing import write_compressed

if TYPE_CHECKING:
    import torch

    from ffsplit.checkpoint.save import SavedCheckpoint
    from ffsplit.pipeline.result import CompressionResult
    from ffsplit.recover.config import Recovery

Compressed = Annotated[
    str,
    typer.Argument(
        help="A checkpoint that ffsplit wrote; a dense model if the first stage is masks.",
        metavar="DIR",
        show_default=False,
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Directory to write.", show_default="DIR-recovered")]
Teacher = Annotated[
    str | None, typer.Option("--teacher", help="The dense model.", metavar="DENSE", show_default="the text alone")
]
Text = Annotated[
    str | None, typer.Option("--data", help="Text to train on.", metavar="SOURCE", show_default="that of the fit")
]
Stages = Annotated[
    str | None, typer.Option("--stage", help="One or more of refit, blocks, masks, model, in order.", metavar="A,B,...")
]
Keep = Annotated[float | None, typer.Option("--keep", help="Stage masks: share of the dense FFN parameters that stay.")]
Scope = Annotated[
    str | None,
    typer.Option("--scope", help="Stage masks: neurons compete in the model or in each ffn.", show_default="model"),
]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimizer steps.", show_default="1000")]
Minutes = Annotated[float | None, typer.Option("--minutes", help="Stop the stage model after so long.")]
Rate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")]
Train = Annotated[str | None, typer.Option("--train", help="What: ffn or all.", show_default="ffn")]
Lora = Annotated[int | None, typer.Option("--lora", help="Train adapters of this rank, merged at the end.")]
LowBit = Annotated[
    str | None, typer.Option("--low-bit", help="Packed matrices: scales, codes or frozen.", show_default="scales")
]
Accumulate = Annotated[int | None, typer.Option("--accumulate", help="Forward passes per step.", show_default="1")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="Of both models' logits.", show_default="1")]
Guided = Annotated[
    float | None, typer.Option("--guide", help="Share of the steps over which the dense FFNs are faded out.")
]
Hidden = Annotated[float | None, typer.Option("--hidden", help="Weight of the loss on hidden states.")]
Labels = Annotated[float | None, typer.Option("--labels", help="Share of the loss that is the text's, 0 to 1.")]
Prefix = Annotated[
    str | None,
    typer.Option("--prefix", help="Inputs of refit and blocks: compressed or dense.", show_default="compressed"),
]
Patience = Annotated[int | None, typer.Option("--patience", help="Evaluations without gain before it stops.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of everything random.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of ffsplit.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not reload and compare after saving.")]


def recover(
    directory: Compressed,
    teacher: Teacher = None,
    data: Text = None,
    out: Out = None,
    stage: Stages = None,
    keep: Keep = None,
    scope: Scope = None,
    steps: Steps = None,
    minutes: Minutes = None,
    lr: Rate = None,
    train: Train = None,
    lora: Lora = None,
    low_bit: LowBit = None,
    temperature: Temperature = None,
    guide: Guided = None,
    hidden: Hidden = None,
    labels: Labels = None,
    prefix: Prefix = None,
    patience: Patience = None,
    accumulate: Accumulate = None,
    field: options.Field = None,
    samples: options.Samples = None,
    seq_len: options.SeqLen = None,
    batch_size: options.BatchSize = None,
    seed: Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    overwrite: Overwrite = False,
    no_verify: NoVerify = False,
    as_json: options.Json = False,
) -> None:
    """Train a compressed checkpoint towards its dense model; its structure and size stay, but for the stage masks.

    A killed run goes on where it stopped when the same command is repeated.
    """
    asked = {
        "stages": stage, "keep": keep, "scope": scope,
        "source": data, "field": field, "samples": samples, "seq_len": seq_len, "steps": steps,
        "batch_size": batch_size, "accumulate": accumulate, "minutes": minutes, "lr": lr, "train": train, "lora": lora,
        "low_bit": low_bit, "temperature": temperature, "guide": guide,
        "hidden": hidden, "labels": labels, "prefix": prefix,
        "patience": patience, "seed": seed,
    }  # fmt: skip
    target = out if out is not None else options.beside(directory, "recovered")
    checks.check_output(target, overwrite=overwrite)
    for name in (directory, teacher):
        if name is not None:
            checks.check_model_name(name)
    place, weights = checks.torch_device(device), checks.torch_dtype(dtype)
    loading.register()
    from ffsplit.pipeline.recover import recovery_of

    settings = recovery_of({name: value for name, value in asked.items() if value is not None})
    if data is not None:
        checks.check_text(data, field, "calibration")
    done = _recovered(directory, teacher, target, settings, place, weights, verify=not no_verify, overwrite=overwrite)
    if done is not None:
        print_json(_document(*done)) if as_json else _show(*done)


def _recovered(
    directory: str,
    teacher: str | None,
    target: Path,
    settings: Recovery,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    verify: bool,
    overwrite: bool,
) -> tuple[CompressionResult, SavedCheckpoint] | None:
    """Train and save; None in all processes but the first of several."""
    from ffsplit.pipeline.recover import recover as run
    from ffsplit.recover.workers import workers

    journal = target.resolve().with_name(f"{target.resolve().name}.ffsplit-journal")
    with quiet(), reporting() as report, resumable(journal):
        result = run(
            directory, teacher, recovery=settings, device=device, dtype=dtype, journal=journal, progress=report
        )
        if not workers(device).first:
            return None
        say(f"saving to {target}")
        saved = write_compressed(result, target, verify=verify, overwrite=overwrite)
        shutil.rmtree(journal, ignore_errors=True)
    return result, saved


def _document(result: CompressionResult, saved: SavedCheckpoint) -> dict[str, Any]:
    return {
        "directory": str(saved.directory),
        "kind": saved.kind,
        "bytes": saved.bytes,
        "recovery": result.report["recovery"],
    }


def _show(result: CompressionResult, saved: SavedCheckpoint) -> None:
    show_recovery(result.report["recovery"])
    if any("widths" in stage for stage in result.report["recovery"]["stages"]):
        show_facts("Budget", budget_facts(result.report["budget"]))
    show_facts("Checkpoint", [("directory", str(saved.directory)), ("size", size(saved.bytes))])
    for text in loading_lines(result, saved):
        line(f"  {text}")
