"""Write the measured table of the README from ``benchmarks/results/{table,peers}*.json``, between its two markers.

Peers that have not been measured have no line yet.

python benchmarks/readme_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PEER = "llm-compressor"
START, END = "<!-- table: start -->", "<!-- table: end -->"

# (what a reader reads, the row's name in the results)
KEEP = [
    ("plain SVD", "svd 0.75"),
    ("FFSplit, 10 % heavy, plain SVD rest (the paper)", "ffsplit svd 10 % heavy 0.75"),
    ("FFSplit, 30 % heavy, plain SVD rest (the paper)", "ffsplit svd 30 % heavy 0.75"),
    ("whitened SVD", "whitened svd 0.75"),
    ("whitened SVD + our refit", "whitened svd + refit 0.75"),
    ("FFSplit, 10 % heavy, whitened rest", "ffsplit whitened 10 % heavy 0.75"),
    ("FFSplit, 10 % heavy, whitened rest + our refit", "ffsplit whitened 10 % heavy + refit 0.75"),
    ("prune by output norm", "prune output norm 0.75"),
    ("prune by output norm + refit", "prune output norm + refit 0.75"),
    ("prune by greedy OBS + refit", "prune greedy OBS + refit 0.75"),
    ("allocator over layers (`auto`), drift repaired", "auto: keep 0.75"),
    ("whitened SVD", "whitened svd 0.5"),
    ("whitened SVD + our refit", "whitened svd + refit 0.5"),
    ("FFSplit, 35 % heavy, whitened rest", "ffsplit whitened 35 % heavy 0.5"),
    ("FFSplit, 35 % heavy, whitened rest + our refit", "ffsplit whitened 35 % heavy + refit 0.5"),
    ("prune by output norm + refit", "prune output norm + refit 0.5"),
    ("prune by leverage + refit", "prune leverage + refit 0.5"),
    ("FFSplit, OBS heavy + linear rest", "ffsplit linear OBS 0.5"),
    ("prune by greedy OBS + refit", "prune greedy OBS + refit 0.5"),
    ("prune by greedy OBS + refit, drift repaired (`prune-best`)", "best: prune greedy OBS + refit 0.5, drift"),
    ("allocator over layers (`auto`), drift repaired", "auto: keep 0.5"),
]
SPARSE = [
    ("Wanda, 2:4", "sparsify 2:4 wanda"),
    ("Wanda, 2:4", "llm-compressor wanda 2:4"),
    ("SparseGPT, 2:4", "sparsify 2:4 sparsegpt"),
    ("SparseGPT, 2:4", "llm-compressor sparsegpt 2:4"),
    ("SparseGPT, 2:4 + our refit", "sparsify 2:4 sparsegpt + refit"),
]
BITS = [
    ("RTN, 4-bit codes", "rtn 4"),
    ("GPTQ, 4-bit codes", "gptq 4"),
    ("GPTQ, 4-bit codes", "llm-compressor gptq w4 g64"),
    ("AWQ, 4-bit codes", "llm-compressor awq w4 g64"),
    ("GPTQ, 4-bit codes + our refit", "gptq 4 + refit"),
    ("FFSplit, 12.5 % int8 + int3, RTN (the paper)", "ffsplit 12.5 % int8 + int3 rtn"),
    ("FFSplit, 12.5 % int8 + int3, GPTQ + our refit", "ffsplit 12.5 % int8 + int3 gptq + refit"),
    ("RTN, 3-bit codes", "rtn 3"),
    ("GPTQ, 3-bit codes", "gptq 3"),
    ("GPTQ, 3-bit codes", "llm-compressor gptq w3 g64"),
    ("AWQ, 3-bit codes", "llm-compressor awq w3 g64"),
    ("GPTQ, 3-bit codes + our refit", "gptq 3 + refit"),
    ("FFSplit, 67 % int3 + int2, GPTQ + our refit and polish", "bits3 h3 r2 g64"),
    ("FFSplit, 25 % int4 + int2, GPTQ + our refit", "ffsplit 25 % int4 + int2 gptq + refit"),
    ("allocator over neurons and layers (`auto`), drift repaired", "auto: 4.0 bits"),
    ("allocator over neurons and layers (`auto`), drift repaired", "auto: 3.0 bits"),
    ("allocator over neurons and layers (`auto`), drift repaired", "auto: 2.5 bits"),
]


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def line(title: str, row: dict[str, Any], budget: str) -> str:
    """A row of the table; that of a peer names its package, and 2:4 is counted at what that layout takes."""
    whose = f", **{row['package']}**" if "package" in row else ""
    spent = "2:4, {bits_2_4:.2f} bits" if "bits_2_4" in row else budget
    quality = f"{number(row['wikitext2'])} | {number(row['c4'])} | {row['kl']:.3f}"
    return f"| {title}{whose} | {spent.format(**row)} | {quality} |"


def table() -> str:
    files = [file for pattern in ("table*.json", "peers*.json") for file in sorted(RESULTS.glob(pattern))]
    documents = [json.loads(file.read_text()) for file in files]
    rows = {row["name"]: row for document in documents for row in document["rows"]}
    dense = documents[0]["dense"]
    lines = [
        "| method | FFN budget | WikiText-2 | C4 | KL to dense |",
        "|---|---|---|---|---|",
        f"| dense | keep 1, 16 bits | {number(dense['wikitext2'])} | {number(dense['c4'])} | 0 |",
    ]
    groups = ((KEEP, "keep {keep_ffn:.2f}"), (SPARSE, "2:4, {bits_ffn:.2f} bits"), (BITS, "{bits_ffn:.2f} bits"))
    for names, budget in groups:
        for title, name in names:
            if name in rows or not name.startswith(PEER):
                lines.append(line(title, rows[name], budget))
    return "\n".join(lines)


def updated(readme: str) -> str:
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
