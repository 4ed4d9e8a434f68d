"""Options that several commands share, with one wording each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MODEL = "Hub id, folder, or GGUF file."
_SOURCE = "'builtin', a text file, a folder, .jsonl/.csv/.parquet, or a dataset id."

Model = Annotated[str, typer.Argument(help=_MODEL, metavar="MODEL", show_default=False)]
Out = Annotated[Path, typer.Option("--out", "-o", help="Directory to write.", metavar="DIR", show_default=False)]
Source = Annotated[str | None, typer.Option("--calibration", help=f"Text: {_SOURCE}", metavar="SOURCE")]
Data = Annotated[str, typer.Option("--data", help=f"Text to evaluate on: {_SOURCE}", metavar="SOURCE")]
Field = Annotated[str | None, typer.Option("--field", help="Field of a record that holds the text.")]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Windows of text.", show_default=False)]
SeqLen = Annotated[int | None, typer.Option("--seq-len", min=2, help="Tokens per window.", show_default=False)]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Windows at a time.", show_default=False)]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda:0, ...; an accelerator if there is one.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16; as stored if not given.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def beside(directory: str, ending: str) -> Path:
    """The output of a command that was given none: a sibling of its input, even where that is called "." or ".."."""
    path = Path(directory)
    named = path if path.name not in ("", "..") else path.resolve()
    return Path(f"{named}-{ending}")
