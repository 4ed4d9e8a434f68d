"""Quality against what is stored, our rows and the peers': a figure, a page of ``ffsplit compare`` and one in Markdown.

Reads ``benchmarks/results/table*.json`` and ``peers*.json`` (one protocol, one dense model), writes
``docs/figures/pareto.{png,svg}``, ``docs/pareto.html`` and ``docs/pareto.md``.

    python benchmarks/pareto_page.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MultipleLocator, NullFormatter, NullLocator

from _common import FIGURES, ROOT, read_results
from ffsplit.report.chart import Mark, place_labels
from ffsplit.report.compare import Comparison
from ffsplit.report.page import write_page
from ffsplit.report.pareto import pareto_front
from ffsplit.report.plots import ACCENT, INK, RULE, SOFT, WARM, save_figure, styled
from ffsplit.report.rows import mark_front

PAGE = ROOT / "docs" / "pareto.md"
OURS, KNOWN, PEER = "ours", "known method, our code", "peer package"
COLOURS = {OURS: ACCENT, KNOWN: SOFT, PEER: WARM}
MARKERS = {OURS: "o", KNOWN: "x", PEER: "D"}
# What makes a row more than a known method run layer by layer.
OWN = re.compile(r"refit|ffsplit|auto|best|drift|linear|bits3|greedy|forward|prune obs|whitened rest")
TEXTS = {"wikitext2": "WikiText-2", "c4": "C4"}


@dataclass(frozen=True)
class Side:
    """A column of panels: what it shows, between which bits, and up to how many times the dense perplexity."""

    title: str
    low: float
    high: float
    worst: dict[str, float]


SIDES = (
    Side("integers", 2.3, 4.85, {"wikitext2": 1.45, "c4": 2.1}),
    Side("16-bit weights, fewer of them", 7.4, 12.6, {"wikitext2": 2.0, "c4": 3.5}),
)
DENSE = "SmolLM2-135M, dense"
FLOAT_BITS = 16.0
FFN_WEIGHTS, OTHER_WEIGHTS = 79_626_240, 54_888_768
"""Of SmolLM2-135M; the others are counted as 16-bit floats."""
LABELS = {
    "auto: 2.5 bits": "auto", "auto: 3.0 bits": "auto", "auto: 4.0 bits": "auto", "auto: keep 0.5": "auto",
    "auto: keep 0.75": "auto", "rtn 4": "RTN", "rtn 3": "RTN", "gptq 4": "GPTQ", "gptq 3": "GPTQ", "awq 3": "AWQ",
    "gptq 4 + refit": "+ refit", "gptq 3 + refit": "+ refit",
    "ffsplit 12.5 % int8 + int3 gptq + refit": "12.5 % int8 + int3",
    "ffsplit 25 % int4 + int2 gptq + refit": "25 % int4 + int2",
    "ffsplit 12.5 % int8 + int3 rtn": "the paper, RTN",
    "prune output norm 0.75": "output norm", "prune output norm + refit 0.75": "+ refit",
    "prune greedy OBS + refit 0.75": "greedy OBS", "prune leverage + refit 0.5": "leverage (MoDeGPT)",
    "prune greedy OBS + refit 0.5": "greedy OBS", "ffsplit whitened 35 % heavy + refit 0.5": "FFSplit, whitened rest",
    "best: prune greedy OBS + refit 0.5, drift": "greedy OBS, drift repaired",
    "ffsplit whitened 10 % heavy + refit 0.75": "FFSplit, whitened rest",
    "whitened svd + refit 0.75": "whitened SVD + refit",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A row at the bits that its weights take, all in."""

    row: dict[str, Any]
    kind: str

    @property
    def bits(self) -> float:
        """As stored; a 2:4 peer at what the 2:4 layout takes, which its own file does not use."""
        return float(self.row.get("bits_2_4", self.row["bits_ffn"]))

    @property
    def label(self) -> str:
        name = str(self.row["name"])
        if self.kind == PEER:
            return name.removeprefix("llm-compressor ").replace(" g64", "").replace("symmetric", "sym.")
        return LABELS.get(name, "")


def load_points() -> tuple[dict[str, Any], list[Point]]:
    """A results file for what they share, and the latest row of every name."""
    documents = [*read_results("table*.json"), *read_results("peers*.json")]
    models = {document["model"]["sha256"] for document in documents}
    if len(models) != 1:
        raise SystemExit(f"the results are of {len(models)} different models")
    rows = {row["name"]: row for document in documents for row in document["rows"]}
    return documents[0], [Point(row, _kind(row)) for row in rows.values()]


def _kind(row: dict[str, Any]) -> str:
    return PEER if "package" in row else OURS if OWN.search(row["name"]) else KNOWN


def front(points: Sequence[Point], text: str) -> list[Point]:
    """Those that no other one beats in bits and perplexity, by bits."""
    marked = pareto_front([(point.bits, point.row[text]) for point in points])
    return sorted((p for p, on in zip(points, marked, strict=True) if on), key=lambda p: p.bits)


def shown(points: Sequence[Point], side: Side, text: str, dense: dict[str, float]) -> list[Point]:
    """The points of one panel."""
    worst = side.worst[text] * dense[text]
    return [p for p in points if side.low <= p.bits <= side.high and p.row[text] <= worst]


def pareto_figure(dense: dict[str, float], points: Sequence[Point]) -> Figure:
    """Perplexity over bits: integers left, 16-bit weights of which fewer are stored right; a row of panels a text."""
    with styled():
        figure = Figure(figsize=(11.5, 8.6), dpi=72, layout="constrained")
        grid = figure.subplots(len(TEXTS), len(SIDES), squeeze=False, gridspec_kw={"width_ratios": [1.35, 1]})
        panels = [
            (grid[i][j], text, side, shown(points, side, text, dense))
            for i, text in enumerate(TEXTS)
            for j, side in enumerate(SIDES)
        ]
        for axes, text, side, inside in panels:
            _panel(axes, inside, dense[text], text)
            axes.set(title=f"{TEXTS[text]}: {side.title}", xlim=(side.low, side.high), ylabel="perplexity",
                     xlabel="stored bits per FFN weight, all in")  # fmt: skip
        handles = [grid[0][0].scatter([], [], color=COLOURS[k], marker=MARKERS[k], label=k) for k in COLOURS]
        figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=3, labelcolor=INK)
        figure.draw_without_rendering()  # the layout must be known before names are placed
        for axes, text, _, inside in panels:
            _name(figure, axes, inside, text)
    return figure


def _panel(axes: Axes, points: Sequence[Point], dense: float, text: str) -> None:
    axes.axhline(dense, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate(f"dense {dense:.1f}", (0.01, dense), (0, -3), xycoords=("axes fraction", "data"), va="top",
                  textcoords="offset points", color=INK)  # fmt: skip
    best = front(points, text)
    axes.plot([p.bits for p in best], [p.row[text] for p in best], drawstyle="steps-post", color=RULE, linewidth=2.2)
    for kind, colour in COLOURS.items():
        chosen = [p for p in points if p.kind == kind]
        axes.scatter([p.bits for p in chosen], [p.row[text] for p in chosen], s=30, color=colour, zorder=3,
                     marker=MARKERS[kind])  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MultipleLocator(2.5 if text == "wikitext2" else 10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.08)


def _name(figure: Figure, axes: Axes, points: Sequence[Point], text: str) -> None:
    """Names where they cover nothing; peers and the front choose first."""
    height = float(figure.bbox.height)
    best = front(points, text)
    places = [axes.transData.transform((p.bits, p.row[text])) for p in points]
    marks = [
        Mark(float(x), height - float(y), title="", emphasis=p.kind == PEER or p in best, label=p.label)
        for p, (x, y) in zip(points, places, strict=True)
    ]
    left, bottom, right, top = axes.bbox.extents
    for point, mark in zip(points, place_labels(marks, (left, height - top, right, height - bottom)), strict=True):
        axes.annotate(
            mark.label, (point.bits, point.row[text]), (mark.label_x - mark.x, mark.y - mark.label_y), fontsize=8.5,
            textcoords="offset points", color=COLOURS[point.kind] if point.kind != KNOWN else INK,
            ha={"start": "left", "middle": "center", "end": "right"}[mark.anchor],
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip


def markdown(document: dict[str, Any], points: Sequence[Point]) -> str:
    """The page around the figure."""
    dense = document["dense"]
    lines = [
        "# Quality against what is stored",
        "",
        "<!-- written by benchmarks/pareto_page.py from benchmarks/results/{table,peers}*.json -->",
        "",
        f"{document['model']['name']}, all 30 FFNs, training-free. Calibration: {document['protocol']['calibration']}. "
        f"Evaluation: {document['protocol']['evaluation']}, of WikiText-2 test and of a C4 slice that nothing was "
        f"calibrated on. Dense: {dense['wikitext2']:.2f} and {dense['c4']:.2f}. Bits are stored bits per weight of the "
        "dense FFN with scales and zeros, a float as 16 bits.",
        "",
        "![Perplexity over stored bits per FFN weight](figures/pareto.png)",
        "",
        "The line is the front of each panel. Rows far above it are left out: those beyond "
        f"{_limits('wikitext2')} times the dense perplexity on WikiText-2 and {_limits('c4')} times on C4. The same as "
        "a page of `ffsplit compare`, whose memory follows from the bits: [pareto.html](pareto.html).",
        "",
        "## The front on WikiText-2",
        "",
        *_table(front(points, "wikitext2")),
        "",
        "## Peers, as their users get them",
        "",
        *_peers(points),
    ]
    return "\n".join(lines) + "\n"


def _limits(text: str) -> str:
    return " and ".join(f"{side.worst[text]:g} ({side.title})" for side in SIDES)


def _table(points: Iterable[Point]) -> list[str]:
    return [
        "| row | whose | bits, all in | FFN parameters kept | WikiText-2 | C4 | KL to dense |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {p.row['name']} | {p.row.get('package', p.kind)} | {p.bits:.2f} | {p.row['keep_ffn']:.2f} "
            f"| {p.row['wikitext2']:.2f} | {p.row['c4']:.2f} | {p.row['kl']:.3f} |"
            for p in points
        ),
    ]


def _peers(points: Sequence[Point]) -> list[str]:
    peers = sorted((point for point in points if point.kind == PEER), key=lambda point: point.bits)
    measured = [
        f"{', '.join(sorted({p.row['package'] for p in peers}))}, run by `benchmarks/peers.py`: only the FFNs' linear "
        "layers, groups of 64 (128 does not divide the 576 inputs of `up` and `gate`, and the package refuses it), all "
        "else at the package's defaults. Bits are those of the checkpoint that the peer saves. 2:4 weights are saved "
        "as dense float16 with zeros, 16 bits; they are shown at the 9 bits that the 2:4 layout takes.",
        "",
        *_table(peers),
    ]
    return [
        *(measured if peers else ["None has been measured yet."]),
        "",
        "For SVD-LLM, MoDeGPT and LLM-Drop we found no package to install: SVD-LLM and LLM-Drop are repositories of "
        "scripts, and of MoDeGPT there are re-implementations by others. Rows of our own code stand for them, not what "
        "their users get: `whitened svd`, `prune leverage + refit` (MoDeGPT's Nyström step for FFNs) and "
        "`drop-ffns cosine`.",
    ]


def comparison(document: dict[str, Any], points: Sequence[Point]) -> dict[str, Any]:
    """What ``ffsplit compare`` makes its page from, the dense model first; sizes follow from the bits."""
    dense = {"name": DENSE, "kind": "dense", "keep_ffn": 1.0, "bits_ffn": FLOAT_BITS, **document["dense"]}
    worst = max(side.worst["wikitext2"] for side in SIDES) * document["dense"]["wikitext2"]
    chosen = sorted((p for p in points if p.label and p.row["wikitext2"] <= worst), key=lambda p: p.bits)
    rows = [_compare_row(Point(dense, KNOWN)), *map(_compare_row, chosen)]
    mark_front(rows)
    test = document["protocol"]["data"]["test.txt"]
    windows, length = map(int, re.findall(r"\d+", document["protocol"]["evaluation"])[:2])
    text = {"source": "WikiText-2", "split": "test", "samples": windows, "seq_len": length, "tokens": windows * length,
            "tokens_sha256": test, "text_sha256": None}  # fmt: skip
    made = Comparison(
        rows=rows,
        checkpoints=[],
        model_kind="causal",
        reference_is_dense=True,
        settings={"device": "GPU", "dtype": "float32", "timing": None},
        provenance={**document["provenance"], "data": text},
    )
    return made.to_dict()


def _compare_row(point: Point) -> dict[str, Any]:
    row, size = point.row, (FFN_WEIGHTS * point.bits + OTHER_WEIGHTS * FLOAT_BITS) / 8
    empty = ("accuracy", "cosine", "bytes_disk", "prefill_seconds", "decode_seconds", "prefill_speed", "decode_speed")
    return {
        **dict.fromkeys(empty),
        "name": row["name"],
        "kind": row.get("kind", "ffsplit"),
        "method": row.get("package", "dense" if row["name"] == DENSE else point.kind),
        "keep_ffn": row["keep_ffn"],
        "keep_model": (FFN_WEIGHTS * row["keep_ffn"] + OTHER_WEIGHTS) / (FFN_WEIGHTS + OTHER_WEIGHTS),
        "bits_ffn": point.bits,
        "bytes_memory": size,
        "perplexity": row["wikitext2"],
        "kl": row.get("kl"),
        "top1": row.get("top1"),
    }


def main() -> None:
    document, points = load_points()
    save_figure(pareto_figure(document["dense"], points), FIGURES / "pareto")
    write_page(comparison(document, points), PAGE.with_suffix(".html"))
    PAGE.write_text(markdown(document, points), encoding="utf-8")


if __name__ == "__main__":
    main()
