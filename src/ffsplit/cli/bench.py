"""``ffsplit bench``: how fast a model or checkpoint is here, beside the dense one, and why it is not faster."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from ffsplit.cli import checks, loading, options
from ffsplit.cli.console import print_json, quiet
from ffsplit.cli.progress import reporting
from ffsplit.errors import RecipeError
from ffsplit.files import write_whole
from ffsplit.plain import plain

Against = Annotated[
    str | None,
    typer.Option("--against", help="The dense model; without it, its FFNs are rebuilt in size.", metavar="DENSE"),
]
Tokens = Annotated[
    str | None,
    typer.Option("--tokens", help="Tokens in a forward; 1,16,128,2048 as far as the model goes.", metavar="N,N,..."),
]
FFNOnly = Annotated[bool, typer.Option("--ffn-only", help="Leave out the whole model.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Timed turns of each; medians count.")]
Peers = Annotated[bool, typer.Option("--peers/--no-peers", help="Measure other storages that are installed.")]
File = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Write the JSON here; in DIR as ffsplit_bench.json, compare uses it.",
                 metavar="FILE|DIR", show_default=False),
]  # fmt: skip


def bench(
    model: options.Model,
    against: Against = None,
    tokens: Tokens = None,
    ffn_only: FFNOnly = False,
    out: File = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    rounds: Rounds = 7,
    peers: Peers = True,
    as_json: options.Json = False,
) -> None:
    """Time a model's FFNs and the whole of it, in turns with the dense ones: speed, memory, limits, and why not."""
    counts = _counts(tokens)
    for place in (model, *([] if against is None else [against])):
        checks.check_model_name(place)
    file = None if out is None else _file(out)
    settings = loading.settings(device, dtype)
    with quiet(), reporting() as report:
        loading.register()
        from ffsplit.bench.run import bench as run

        found = run(
            model,
            against=against,
            tokens=counts,
            ffn_only=ffn_only,
            device=settings.device,
            dtype=settings.dtype,
            rounds=rounds,
            peers=peers,
            progress=report,
        )
    document = found.to_dict()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(plain(document), indent=1, allow_nan=False) + "\n")
    if as_json:
        print_json(document)
        return
    from ffsplit.cli.bench_tables import show_bench

    show_bench(found)


def _file(out: Path) -> Path:
    """Where the result goes: the file, or, in a folder that is there, the name that ``ffsplit compare`` looks for.

    Raises:
        CheckpointError: it cannot be written, or something else is there.
    """
    from ffsplit.bench.result import BENCH_FILE, FORMAT

    file = out / BENCH_FILE if os.path.isdir(out) else out
    checks.check_file(file, f'"{FORMAT}"', "a result of bench")
    return file.resolve()


def _counts(listed: str | None) -> list[int] | None:
    """The numbers of a list such as ``1,16,128``.

    Raises:
        RecipeError: there is none, or one is no whole number above 0.
    """
    if listed is None:
        return None
    parts = [part.strip() for part in listed.split(",") if part.strip()]
    if not parts:
        raise RecipeError(f"--tokens {listed!r}: name at least one number of tokens, such as 1,16,128")
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            raise RecipeError(f"--tokens {part!r}: must be a whole number of at least 1")
    return [int(part) for part in parts]
