"""What ``compress`` prints: coverage, budget, errors by layer, the checkpoint and how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ffsplit.cli.allocation import show_allocation
from ffsplit.cli.tables import line, percent, show, show_facts, size

if TYPE_CHECKING:
    from ffsplit.checkpoint.save import SavedCheckpoint
    from ffsplit.pipeline.result import CompressionResult

LAYER_ROWS = 10


def compression_document(result: CompressionResult, saved: SavedCheckpoint) -> dict[str, Any]:
    """Everything about a compression, for JSON."""
    return {
        "directory": str(saved.directory),
        "kind": saved.kind,
        "bytes": saved.bytes,
        "dense_bytes": dense_bytes(result),
        "recipe": result.recipe.model_dump(mode="json"),
        "report": result.report,
    }


def show_compression(result: CompressionResult, saved: SavedCheckpoint) -> None:
    """The same for people."""
    report = result.report
    show_facts("Coverage", _coverage(report["coverage"]))
    show_facts("Budget", budget_facts(report["budget"]))
    if gone := report.get("attention"):
        show_facts("Attention, which budgets do not count", _attention(gone))
    if allocation := report.get("decision", {}).get("allocation"):
        show_allocation(allocation)
    if report["layers"]:
        show_layers(report["layers"])
    if "recovery" in report:
        show_recovery(report["recovery"])
    show_facts("Checkpoint", _checkpoint(result, saved))
    for text in loading_lines(result, saved):
        line(f"  {text}")


def dense_bytes(result: CompressionResult) -> int:
    """Bytes of the dense model's weights in the dtype it was worked on in."""
    ffn = sum(planned.dense_shape.parameters for planned in result.plan.ffns)
    share: float = result.report["coverage"]["ffn_share_of_model"]
    return round(ffn / share) * int(result.model.dtype.itemsize)


def show_layers(layers: Sequence[dict[str, Any]]) -> None:
    """Errors by layer; neighbours are folded into one row where there are many."""
    show(
        "Relative error of the outputs, on the calibration inputs",
        ("FFNs", "method", "mean", "worst"),
        list(_folded(layers)),
        words=2,
    )


def show_recovery(recovery: dict[str, Any]) -> None:
    """One row a stage."""
    rows = [
        (
            stage["stage"],
            f"{stage['held_out_loss_before']:.5f}",
            f"{stage['held_out_loss']:.5f}",
            f"{stage['steps']:,}",
            f"{stage['seconds']:.1f}",
        )
        for stage in recovery["stages"]
    ]
    show("Recovery, loss on held-out text", ("stage", "before", "after", "steps", "seconds"), rows, words=1)


def _folded(layers: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    step = -(-len(layers) // LAYER_ROWS) if layers else 1
    for start in range(0, len(layers), step):
        part = layers[start : start + step]
        errors = [layer["output_error"] for layer in part if layer["output_error"] is not None] or [float("nan")]
        names = part[0]["ffn"] if len(part) == 1 else f"{part[0]['ffn']} ... {part[-1]['ffn']}"
        methods = ", ".join(dict.fromkeys(layer["method"] for layer in part))
        yield names, methods, f"{sum(errors) / len(errors):.4f}", f"{max(errors):.4f}"


def _coverage(coverage: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "FFNs", str(coverage["ffns"])
    yield "of all FFN parameters", percent(coverage["covered_share_of_ffn"])
    yield "of the model's parameters", percent(coverage["ffn_share_of_model"])
    for note in coverage["uncovered_notes"]:
        yield "not covered", note


def budget_facts(budget: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is left of a model."""
    yield "FFN parameters kept", percent(budget["keep_ffn"])
    yield "of linear layers", percent(budget["keep_linear"])
    yield "of the model", percent(budget["keep_model"])
    yield "bits per FFN weight", f"{budget['bits_ffn']:.3f} (scales and zeros counted, floats as 16)"


def _attention(gone: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "left out", f"{len(gone['left_out'])} of {gone['of']}: {', '.join(gone['left_out'])}"
    yield "of the model's parameters", percent(gone["share_of_model"])


def _checkpoint(result: CompressionResult, saved: SavedCheckpoint) -> Iterator[tuple[str, str]]:
    yield "directory", str(saved.directory)
    yield "size", f"{size(saved.bytes)} (dense weights in {result.model.dtype}: {size(dense_bytes(result))})"
    yield "kind", "plain transformers" if saved.kind == "stock" else "ffsplit (import ffsplit before loading)"
    yield "seconds", f"{result.report['seconds']:.1f}"


def loading_lines(result: CompressionResult, saved: SavedCheckpoint) -> list[str]:
    """Python that loads the checkpoint."""
    name = _loader(result)
    first = [] if saved.kind == "stock" else ["import ffsplit"]
    return [*first, f"from transformers import {name}", f'model = {name}.from_pretrained("{saved.directory}")']


def _loader(result: CompressionResult) -> str:
    """The automatic class of a language model, and the very class of any other, which keeps its head."""
    from ffsplit.evaluate.kinds import ModelKind, model_kind

    automatic = {ModelKind.CAUSAL: "AutoModelForCausalLM", ModelKind.MASKED: "AutoModelForMaskedLM"}
    return automatic.get(model_kind(result.model), type(result.model).__name__)
