"""Write the tables of ``docs/glue.md`` and the README from ``benchmarks/results/glue-*.json``, between their markers.

python benchmarks/glue_table.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "docs" / "glue.md", ROOT / "README.md")
START, END = "<!-- glue: start -->", "<!-- glue: end -->"
ENCODERS = {"mpnet": "MPNet-base", "minilm": "MiniLM-L6"}
TASKS = {"stsb": "STS-B, Spearman", "sst2": "SST-2, accuracy", "agnews": "AG News, accuracy"}
METRIC = {"stsb": "spearman", "sst2": "accuracy", "agnews": "accuracy"}
BUDGETS = {
    ("mpnet", "43.1"): "43.1 % of the encoder's parameters gone, all from the FFNs",
    ("minilm", "43.1"): "43.1 % of the FFN parameters gone",
    ("mpnet", "70"): "70 % of the FFN parameters gone",
    ("minilm", "70"): "70 % of the FFN parameters gone",
}
# Columns of the README's table; of several ways the first that was run.
MAIN = {
    "dense": ("dense",),
    "plain SVD + fine-tune": ("svd",),
    "FFSplit (low-rank rest) + fine-tune": ("ffsplit",),
    "FFSplit (whitened rest), distilled on plain text first": ("ffsplit-general",),
    "and on 30,000 pairs": ("ffsplit-pairs",),
    "pruned with refit, distilled": ("best-general", "best"),
    "and on 30,000 pairs ": ("best-pairs",),
}
WAYS = {
    "dense": "dense",
    "dense-twice": "dense, fine-tuned twice",
    "svd": "plain SVD + fine-tune",
    "ffsplit": "FFSplit (10 % heavy, low-rank rest) + fine-tune",
    "best": "prune, greedy OBS, refit, drift repair + distillation",
    "best-general": "prune, leverage, refit, distilled on plain text + distillation",
    "ffsplit-general": "FFSplit (10 % heavy, whitened rest), distilled on plain text + distillation",
    "dense-pairs": "dense, fine-tuned again on 30,000 pairs that it labelled",
    "best-pairs": "prune, leverage, refit, distilled on plain text + distillation on 30,000 pairs",
    "ffsplit-pairs": "FFSplit (10 % heavy, whitened rest), distilled on plain text + distillation on 30,000 pairs",
    "movement": "neurons chosen while fine-tuning (movement pruning) + distillation",
    "prune": "prune, greedy OBS, refit + fine-tune",
    "prune-bias": "the same with an output bias + fine-tune",
    "whitened-svd": "whitened SVD + refit + fine-tune",
    "ffsplit-linear": "FFSplit (OBS heavy, linear rest) + fine-tune",
    "best-linear": "FFSplit (OBS heavy, linear rest), drift repair + distillation",
    "svd-distilled": "plain SVD + distillation",
}
# Shares of heavy neurons, everything else equal.
SWEEP = {
    "0 %": "heavy-0",
    "1 %": "heavy-0.01",
    "3 %": "heavy-0.03",
    "5 %": "heavy-0.05",
    "10 %": "ffsplit",
    "25 %": "heavy-0.25",
    "10 % at random": "heavy-random",
}
SWEPT = ("stsb", "43.1")
Key = tuple[str, str, str, str]
Rows = dict[Key, list[dict[str, Any]]]


def read() -> Rows:
    """All rows by encoder, task, budget and way; a seed counts once."""
    found: dict[Key, dict[int, dict[str, Any]]] = defaultdict(dict)
    for file in sorted(RESULTS.glob("glue-*.json")):
        document = json.loads(file.read_text(encoding="utf-8"))
        for row in document["rows"] if document["benchmark"] == "glue" else ():
            found[row["encoder"], row["task"], row["budget"], row["way"]][row["seed"]] = row
    lost = [" ".join(key) for key in found if not has_place(*key)]
    if lost:
        raise SystemExit(f"no table has a place for {', '.join(lost)}")
    return {key: [rows[seed] for seed in sorted(rows)] for key, rows in found.items()}


def has_place(encoder: str, task: str, budget: str, way: str) -> bool:
    """Whether a row is shown somewhere."""
    if encoder not in ENCODERS or task not in TASKS:
        return False
    if way.startswith("dense"):
        return budget == "dense" and way in WAYS
    return ((encoder, budget) in BUDGETS and way in WAYS) or ((task, budget) == SWEPT and way in SWEEP.values())


def figure(rows: list[dict[str, Any]] | None, scores: str = "scores") -> str:
    """Mean and spread over seeds, with the number of seeds where it is not 3."""
    if not rows:
        return "-"
    values = [row[scores][METRIC[row["task"]]] for row in rows]
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}" + (
        "" if len(values) == 3 else f" ({len(values)} seed{'s'[: len(values) > 1]})"
    )


def quality(rows: Rows) -> list[str]:
    """One line a method, a column before and one after the fine-tuning that follows the compression."""
    lines: list[str] = []
    for encoder, title in ENCODERS.items():
        for task, name in TASKS.items():
            for budget in ("43.1", "70"):
                keys = [(way, (encoder, task, "dense" if way.startswith("dense") else budget, way)) for way in WAYS]
                if not any(key in rows for way, key in keys if not way.startswith("dense")):
                    continue
                lines += [f"**{title}, {name}, {BUDGETS[encoder, budget]}**", ""]
                lines += ["| method | FFN kept | before fine-tuning again | after |", "|---|---|---|---|"]
                lines += [line(WAYS[way], rows[key]) for way, key in keys if key in rows] + [""]
    return lines


def line(title: str, rows: list[dict[str, Any]]) -> str:
    kept = rows[0].get("keep_ffn") or (rows[0].get("recipe") or {}).get("keep")
    if "scores_before_training" not in rows[0]:
        return f"| {title} | {1 if kept is None else f'{kept:.3f}'} | | {figure(rows)} |"
    return f"| {title} | {kept:.3f} | {figure(rows, 'scores_before_training')} | {figure(rows)} |"


def sweep(rows: Rows) -> list[str]:
    """The share of heavy neurons, everything else equal."""
    lines: list[str] = []
    for encoder, title in ENCODERS.items():
        there = {share: rows.get((encoder, *SWEPT, way)) for share, way in SWEEP.items()}
        if not any(found for share, found in there.items() if SWEEP[share] not in WAYS):
            continue
        lines += [f"**{title}, STS-B, the share of heavy neurons beside a plain low-rank rest, same budget**", ""]
        lines += ["| heavy | before fine-tuning again | after |", "|---|---|---|"]
        lines += [
            f"| {share} | {figure(found, 'scores_before_training')} | {figure(found)} |"
            for share, found in there.items()
        ]
        lines += [""]
    return lines


def speed() -> list[str]:
    """Whole-encoder speed against dense in the same run, a table for every file and encoder."""
    lines: list[str] = []
    for file in sorted(RESULTS.glob("glue-speed-*.json")):
        document = json.loads(file.read_text(encoding="utf-8"))
        for encoder in dict.fromkeys(row["encoder"] for row in document["rows"]):
            rows = [row for row in document["rows"] if row["encoder"] == encoder]
            lines += [f"**{ENCODERS[encoder]}, {circumstances(document)}, times dense**", "", *speeds(rows), ""]
    return lines


def circumstances(document: dict[str, Any]) -> str:
    """Where a file's times were taken; files of before there were other runtimes are of torch."""
    hardware = document["provenance"]["hardware"]
    place = hardware["accelerator"] or f"CPU, {hardware['threads']} thread(s)"
    runtime = {"torch": "torch", "onnx": "ONNX Runtime"}[document.get("runtime", "torch")]
    if document.get("clock") == "cpu":
        place += ", processor time"
    widths = f", widths in multiples of {document['align']}" if document.get("align", 1) > 1 else ""
    return f"{place}, {runtime}, {document['dtype']}, sequence length {document['seq_len']}{widths}"


def column_of(row: dict[str, Any]) -> tuple[int, bool, bool]:
    return row["batch"], row["graph"], row.get("compiled", False)


def column_title(column: tuple[int, bool, bool]) -> str:
    batch, graph, compiled = column
    how = f", {'compiled ' * compiled}graph" if graph else ", compiled" * compiled
    return f"batch {batch}{how}"


def speeds(rows: list[dict[str, Any]]) -> list[str]:
    """A line for every variant and a column for every way of running that some got through; failures are told below."""
    columns = sorted({column_of(row) for row in rows if "failed" not in row})
    lines = [f"| variant | FFN kept | {' | '.join(map(column_title, columns))} |", "|---" * (len(columns) + 2) + "|"]
    by_place = {(row["variant"], column_of(row)): row for row in rows}
    kept = {row["variant"]: row["keep_ffn"] for row in rows}
    for variant, keep in kept.items():
        cells = [f"{keep:.3f}", *(cell(by_place.get((variant, column))) for column in columns)]
        lines.append(f"| {'no FFN (the limit)' if variant == 'none' else variant} | {' | '.join(cells)} |")
    return [*lines, *failures(rows)]


def cell(row: dict[str, Any] | None) -> str:
    """Times dense; of dense itself also the milliseconds, with which columns compare."""
    if row is None:
        return "-"
    if "failed" in row:
        return "failed"
    shown = "?" if row["speed"] is None else f"{row['speed']:.2f}"
    if row["variant"] != "dense" and row["speed"] is not None:
        return shown
    taken = row["milliseconds"]
    return f"{shown} ({taken:,.0f} ms)" if taken >= 100 else f"{shown} ({taken:.3g} ms)"


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Which variants failed in which columns, a paragraph for every reason."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if "failed" in row:
            found[row["failed"]][column_title(column_of(row))].append(row["variant"])
    count = len({row["variant"] for row in rows})
    lines: list[str] = []
    for why, columns in found.items():
        where = [f"{column}: {'all' if len(names) == count else ', '.join(names)}" for column, names in columns.items()]
        lines += ["", f"Failed ({why}): {'; '.join(where)}."]
    return lines


def summary(rows: Rows) -> list[str]:
    """The README's table: what the paper's experiment asks for, one line an encoder, task and budget."""
    lines = [f"| | {' | '.join(title.strip() for title in MAIN)} |", "|---" * (len(MAIN) + 1) + "|"]
    for encoder, task, budget in product(ENCODERS, TASKS, ("43.1", "70")):
        found = {way: rows.get((encoder, task, "dense" if way == "dense" else budget, way)) for way in WAYS}
        if not any(found[way] for ways in MAIN.values() for way in ways if way != "dense"):
            continue
        cells = [figure(next((found[way] for way in ways if found[way]), None)) for ways in MAIN.values()]
        lines.append(f"| {ENCODERS[encoder]}, {TASKS[task]}; {BUDGETS[encoder, budget]} | {' | '.join(cells)} |")
    return lines


def updated(page: str, lines: list[str]) -> str:
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n" + "\n".join(lines).rstrip("\n") + f"\n{END}{after}"


def tables() -> tuple[list[str], list[str]]:
    """The lines of the docs page and those of the README."""
    rows = read()
    if not rows and not list(RESULTS.glob("glue-speed-*.json")):
        nothing = ["Not run yet."]
        return nothing, nothing
    return [*quality(rows), *sweep(rows), *speed()], summary(rows)


if __name__ == "__main__":
    for page, lines in zip(PAGES, tables(), strict=True):
        page.write_text(updated(page.read_text(encoding="utf-8"), lines), encoding="utf-8")
