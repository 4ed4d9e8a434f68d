"""``ffsplit export``: a checkpoint as a graph for another runtime."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from ffsplit.cli import checks, loading, options
from ffsplit.cli.console import print_json, quiet, say
from ffsplit.cli.tables import show_facts, size

Checkpoint = Annotated[
    str, typer.Argument(help="A checkpoint in ffsplit's format, or a plain one.", metavar="DIR", show_default=False)
]
To = Annotated[Literal["onnx"], typer.Option("--to", help="The runtime's format.", show_default=False)]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Directory to write; DIR-onnx if not given.", metavar="DIR")
]
FloatInputs = Annotated[
    bool, typer.Option("--float-inputs", help="Leave the inputs of low-bit matrices in float32: exact, and slower.")
]


def export(
    directory: Checkpoint, to: To, out: Out = None, float_inputs: FloatInputs = False, as_json: options.Json = False
) -> None:
    """Write a checkpoint as an ONNX graph, and check it in ONNX Runtime.

    Low-bit codes stay codes (MatMulNBits), int8 weights stay int8; what has no such node becomes float32, with a note.
    """
    checks.check_model_name(directory)
    target = out if out is not None else options.beside(directory, to)
    checks.check_output(target)
    with quiet():
        loading.register()
        from ffsplit.export.run import export_onnx

        say(f"exporting {directory}")
        done = export_onnx(directory, target, round_inputs=not float_inputs)
    if as_json:
        print_json({**asdict(done), "directory": str(target)})
        return
    rounded = [] if done.rounded_difference is None else [("inputs in 8 bits", f"{done.rounded_difference:.2g}")]
    facts = [
        ("directory", str(target)),
        ("kind", "decoder with key-value cache" if done.kind == "decoder" else "encoder"),
        ("size", size(done.bytes)),
        ("off torch's outputs", f"{done.difference:.2g}"),
        *rounded,
        *(("note", note) for note in done.notes),
    ]
    show_facts("ONNX model", facts)
