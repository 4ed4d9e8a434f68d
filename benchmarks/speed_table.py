"""Write the tables of ``docs/speed.md`` and ``docs/onnx.md`` from their results, between their markers.

python benchmarks/speed_table.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SPEED, ONNX = ROOT / "docs" / "speed.md", ROOT / "docs" / "onnx.md"
GPU_COLUMNS = {
    "int4": "int4",
    "int3": "int3",
    "ffsplit int8 10 % + int4": "10 % int8 + int4",
    "ffsplit bf16 10 % + int4": "10 % bf16 + int4",
    "cats 50 %": "cats, 50 % skipped",
    "pruned 0.5": "pruned 0.5",
    "split low rank 0.5": "split low rank 0.5",
    "torch int4": "torch int4",
    "torchao int4": "torchao int4",
    "gemlite w4": "gemlite w4",
}
FLOAT8 = ", float8"
CPU_ROWS = (
    "dense", "pruned 0.5", "split low rank 0.5", "int4", "int3", "int8", "25% int8 + int4", "w8a8", "cats 50 %",
)  # fmt: skip
FLOATS = ("fp32", "bf16")
OF_TORCH = ("int4, bf16", "int4, fp32", "int8, bf16", "int8, fp32", "w8a8, fp32")


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def table(corner: str, columns: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    head = [corner, *columns]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return [*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows), ""]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def gpu(name: str) -> list[str]:
    """Times dense by tokens, one table a shape; beyond the kernels' tokens a second row has float8."""
    lines: list[str] = []
    for (d_model, d_ff, gated), found in groupby(
        read(name)["rows"], lambda row: (row["d_model"], row["d_ff"], row["gated"])
    ):
        measured = {row["tokens"]: row for row in found}
        first = measured[min(measured)]["microseconds"]["dense bf16"]
        lines += [f"{d_model}/{d_ff} {'gated' if gated else 'without a gate'} (dense at one token: {first} us)", ""]
        rows: list[tuple[str, list[str]]] = []
        for tokens, row in sorted(measured.items()):
            times = row["times_dense"]
            float8 = any(name.endswith(FLOAT8) for name in times)
            rows.append((f"{tokens}, exact" if float8 else str(tokens), cells(times)))
            if float8:
                only = {name.removesuffix(FLOAT8): value for name, value in times.items() if name.endswith(FLOAT8)}
                rows.append((f"{tokens}{FLOAT8}", cells(only)))
        lines += table("tokens", GPU_COLUMNS.values(), rows)
    return lines


def cells(times: Mapping[str, float]) -> list[str]:
    return [number(times.get(name)) for name in GPU_COLUMNS]


def cpu(name: str) -> list[str]:
    """Every storage over dense of its dtype, what torch itself offers, and SmolLM2 whole."""
    document = read(name)
    lines: list[str] = []
    for shape, found in document["ffn"].items():
        lines += [shape, "", *over_dense(found["milliseconds"]), *of_torch(found)]
    lines += ["SmolLM2-135M whole", ""]
    return lines + over_dense(document["smollm2"]["milliseconds"])


def over_dense(times: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Of results by column and name; dense itself in milliseconds."""
    rows: list[tuple[str, list[str]]] = []
    for short in FLOATS:
        dense = f"dense, {short}"
        rows.append((f"{dense} (ms)", [f"{row[dense]:,.2f}" for row in times.values()]))
        for name in (f"{row}, {short}" for row in CPU_ROWS[1:]):
            if any(name in row for row in times.values()):
                rows.append((name, [number(row[dense] / row[name]) if name in row else "" for row in times.values()]))
    return table("times dense of the same dtype", times, rows)


def of_torch(found: Mapping[str, Any]) -> list[str]:
    shares, splits = found["of_the_best_of_torch"], found["split_over_pruned"]
    rows = [(name, [number(row[name]) for row in shares.values()]) for name in OF_TORCH]
    rows += [
        (f"split over pruned (time), {short}", [number(row[short]) for row in splits.values()]) for short in FLOATS
    ]
    return table("share of torch's best", shares, rows)


def onnx(name: str) -> list[str]:
    """Times dense in ONNX Runtime, with the goals that rows have, and the whole encoder."""
    document = read(name)
    measured = {(row["row"], row["d_model"], row["tokens"]): row for row in document["ffn"]}
    columns = {(row["d_model"], row["tokens"]): row for row in document["ffn"]}
    titles = [
        f"{row['d_model']}/{row['d_ff']}{' gated' * row['gated']}, {tokens} token{'s' * (tokens > 1)}"
        for (_, tokens), row in columns.items()
    ]
    rows = []
    for name in dict.fromkeys(row["row"] for row in document["ffn"]):
        found = [measured[name, *column] for column in columns]
        rows.append((name, [timed(row) for row in found]))
    encoder = document["encoder"]
    whole = [
        (row["row"], [f"{row['milliseconds']:.1f} ms" if row["row"] == "dense" else number(row["times_dense"])])
        for row in encoder
    ]
    return [*table("FFN", titles, rows), *table("MiniLM-L6 whole", ["128 tokens"], whole)]


def timed(row: Mapping[str, Any]) -> str:
    if row["row"] == "dense":
        return f"{row['milliseconds']:.2f} ms"
    goal = "" if row["goal"] is None else f" ({row['goal']:g})"
    over = "" if "over_pruned" not in row else f", {row['over_pruned']:.2f} of pruned's time"
    return number(row["times_dense"]) + goal + over


def circumstances(name: str) -> list[str]:
    """Where and with what a file's times were taken."""
    document = read(name)
    found = document["provenance"]
    hardware, versions = found["hardware"], found["versions"]
    place = hardware["accelerator"] or f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} thread(s)"
    shown = [f"{package} {versions[package]}" for package in ("torch", "transformers")]
    shown += [f"{package} {version}" for package, version in document.get("packages", {}).items()]
    return [f"`{name}.json`: {place}; {', '.join(dict.fromkeys(shown))}; {found['date'][:10]}.", ""]


# By marker: the page, the results file and what makes lines of it. AMX and Zen 5 are two kinds of CPU.
TABLES: dict[str, tuple[Path, str, Callable[[str], list[str]]]] = {
    "gpu": (SPEED, "gpu-h200", gpu),
    "cpu": (SPEED, "cpu", cpu),
    "cpu-zen5": (SPEED, "cpu-zen5", cpu),
    "onnx": (ONNX, "onnx-cpu", onnx),
    "onnx-zen5": (ONNX, "onnx-cpu-zen5", onnx),
}


def updated(page: str, name: str) -> str:
    """A page with the lines between the markers of this name made anew."""
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    _, file, lines = TABLES[name]
    return f"{before}{start}\n" + "\n".join([*circumstances(file), *lines(file)]).rstrip("\n") + f"\n{end}{after}"


if __name__ == "__main__":
    for name, (page, _, _) in TABLES.items():
        page.write_text(updated(page.read_text(encoding="utf-8"), name), encoding="utf-8")
