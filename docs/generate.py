"""Write ``docs/methods.md`` from the registry of methods and the benchmark's results.

``python docs/generate.py`` writes it; ``tests/unit/test_docs.py`` checks that the page in the repository is up to date.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from ffsplit.budget.registry import Planner, entries
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.registry import EXAMPLE_BUDGETS, Method, MethodConfig
from ffsplit.pipeline.recipe import DEFAULT_BITS, PRESETS

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "methods.md"
RESULTS = DOCS.parent / "benchmarks" / "results"
NOTES = DOCS / "notes"
"""One file a method: when it pays and when it does not; ``{row}`` and ``{c4:row}`` stand for measured figures."""
SHAPE = FFNShape(d_model=576, d_ff=1536, gated=True)
"""The FFN of SmolLM2-135M: every method can plan for it, no weights needed."""

HEAD = """<!-- Written by docs/generate.py from the registry. Do not edit: run `make docs`. -->

# Methods

Every method turns one FFN into a sum of branches (see [architecture.md](architecture.md)). `keep` is the share of the
FFN's parameters that stay; `bits` is the average number of stored bits per weight of the dense FFN, with scales, zeros
and biases counted and floating-point numbers taken as 16 bits. With `keep: 1` or `bits: 16` a method that takes that
budget leaves the FFN as it is.

The command line and recipes name a method by the first column: `ffsplit compress MODEL --out DIR --recipe prune --keep
0.75`, or in a recipe file

```yaml
method: {method: prune, keep: 0.75, score: leverage}
```

Which papers these cover, and which are left out and why: [survey.md](survey.md).
"""

STORED = """
A method does the same to every FFN, unless overrides in a recipe say otherwise. A *planner* ("by decision") measures
the dense model first and then chooses a method and its settings for each FFN.

"plain transformers" means that the result loads without this package. It needs one width for all layers that share a
field of the configuration, and a field for that width: an override for some layers, or a family without such a field
(MPT, DINOv2, Swin), gives a checkpoint in ffsplit's format instead (see [checkpoint.md](checkpoint.md)). A budget that
leaves everything as it is gives a plain one with every method. "text: by settings": no text is needed for `rounding:
rtn`, nor with `refit: false` for `score: magnitude` or `random`, for `sweeps: 0` or for `alpha: 0`.
"""


def page() -> str:
    """The whole page."""
    results = _merged("table*.json")
    found = list(entries().values())
    parts = [HEAD, _status(found), _presets(), _protocol(results)]
    parts += [_section(method, results) for method in found]
    return "\n".join(parts).rstrip() + "\n"


def _merged(pattern: str) -> dict[str, Any]:
    """Results of one benchmark as one document: the protocol of the first file, the rows of all."""
    documents = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob(pattern))]
    return {**documents[0], "rows": [row for document in documents for row in document["rows"]]}


def _status(found: list[Method | Planner]) -> str:
    rows = [
        [
            f"[`{method.name}`](#{method.name})",
            method.summary,
            method.paper,
            " or ".join(f"`{budget}`" for budget in method.budget) or "none",
            method.as_sum,
            method.status,
            needs_data(method),
            stored_as(method),
        ]
        for method in found
    ]
    table = _table(["method", "what it does", "paper", "budget", "as a sum", "status", "text", "stored as"], rows)
    return f"{table}\n{_wrapped(STORED)}\n"


def _presets() -> str:
    rows = [[f"`{name}`", f"`{_yaml(fields)}`"] for name, fields in PRESETS.items()]
    introduction = "Recipes with names of their own:\n\n"
    budget = (
        f"A method that takes `bits` and is given no budget gets `bits: {DEFAULT_BITS:g}`; one that takes only `keep` "
        "must be given it."
    )
    return f"{introduction}{_table(['recipe', 'settings'], rows)}\n{_wrapped(budget)}\n"


def _yaml(value: Any) -> str:
    """A mapping in YAML's short form."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def _wrapped(text: str) -> str:
    """Paragraphs filled to the line length of this repository."""
    paragraphs = (" ".join(part.split()) for part in text.strip().split("\n\n"))
    return "\n\n".join(textwrap.fill(part, 120, break_on_hyphens=False, break_long_words=False) for part in paragraphs)


def _protocol(results: dict[str, Any]) -> str:
    protocol, dense = results["protocol"], results["dense"]
    words = (
        "The figures below are perplexities on WikiText-2 (on C4 where it says so) of "
        f"{results['model']['name']}, whose dense perplexity is {dense['wikitext2']:.2f} ({dense['c4']:.2f} on C4). "
        f"Calibration: {protocol['calibration']}. Evaluation: {protocol['evaluation']}. All of them are in "
        "`benchmarks/results/` (table*.json) with their recipes. They are of one model with 135 million parameters."
    )
    lines = _merged("methods*.json")
    told, spearman = lines["protocol"], lines["dense"]["spearman"]
    measured = (
        f"The line *Measured* of a method is of {lines['model']['name']}, all 6 FFNs, on a CPU (methods*.json there). "
        f"Calibration: {told['calibration']}. Evaluation: {told['evaluation']}; the dense model has {spearman:.2f}. "
        "*Work* is the share of multiply-accumulates that an average token needs; masks that no kernel uses yet count "
        "as if one did."
    )
    return f"{_wrapped(words)}\n\n{_wrapped(measured)}\n"


def _measured(name: str) -> str:
    """What the benchmark of methods found, a line for every setting that was tried."""
    rows = [row for row in _merged("methods*.json")["rows"] if row["method"] == name]
    return "".join(
        f"* Measured with `{_yaml(row['settings'])}`: Spearman {row['spearman']:.2f}, cosine {row['cosine']:.3f}; keep "
        f"{row['keep_ffn']:.2f}, {row['bits_ffn']:.2f} bits, work {row['macs_ffn']:.2f}.\n"
        for row in rows
    )


def _section(method: Method | Planner, results: dict[str, Any]) -> str:
    introduction = (
        f"## {method.name}\n\n{_sentence(method.summary)} Paper: {method.paper}. As a sum: {method.as_sum}.\n"
    )
    note = NOTES / f"{method.name}.md"
    if not note.is_file():
        raise KeyError(f"docs/notes has no {note.name}: say when the method pays and when it does not")
    words = _filled(note.read_text(encoding="utf-8"), results)
    parts = [introduction, _settings(method.config), _wrapped(words), ""]
    measured = _measured(method.name)
    return "\n".join([*parts, measured] if measured else parts)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def _filled(note: str, results: dict[str, Any]) -> str:
    """The note with every ``{row}`` and ``{c4:row}`` replaced by that row's measured perplexity."""
    rows = {row["name"]: row for row in results["rows"]}

    def figure(match: re.Match[str]) -> str:
        corpus, name = ("c4", match[1][3:]) if match[1].startswith("c4:") else ("wikitext2", match[1])
        if name not in rows:
            raise KeyError(f"{RESULTS.name} has no row {name!r}, which docs/generate.py quotes")
        value = rows[name][corpus]
        return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"

    # A quoted name may be broken over two lines.
    return re.sub(r"\{([^{}]+)\}", figure, re.sub(r"\{[^{}]+\}", lambda found: " ".join(found[0].split()), note))


def needs_data(method: Method | Planner) -> str:
    """Whether fitting looks at text: always, never, or by settings."""
    answers = {_config(method, **extra).needs_data for extra in _variants(method)}
    return "by settings" if len(answers) > 1 else "needed" if answers == {True} else "not needed"


def stored_as(method: Method | Planner) -> str:
    """The kind of checkpoint that its structure leads to: plain transformers takes one dense branch, nothing else."""
    if isinstance(method, Planner):
        return "by decision"
    plain = [method.plan(SHAPE, _config(method, **extra)).is_one_dense_branch for extra in _variants(method)]
    return "plain transformers" if all(plain) else "by settings" if any(plain) else "ffsplit"


def _variants(method: Method | Planner) -> list[dict[str, Any]]:
    """Settings that may change what a method needs or gives."""
    budgets: list[dict[str, Any]] = [{budget: EXAMPLE_BUDGETS[budget]} for budget in method.budget] or [{}]
    switches: list[dict[str, Any]] = [{}]
    if "rounding" in method.config.model_fields:
        switches.append({"rounding": "rtn"})
    if "sweeps" in method.config.model_fields:
        switches.append({"sweeps": 0, "refit": False})
    if "alpha" in method.config.model_fields:
        switches.append({"alpha": 0})
    score = method.config.model_fields.get("score")
    if score is not None and "magnitude" in get_args(score.annotation):
        refit = {"refit": False} if "refit" in method.config.model_fields else {}
        switches.append({"score": "magnitude", **refit})
    return [{**budget, **switch} for budget in budgets for switch in switches]


def _config(method: Method | Planner, **values: Any) -> MethodConfig:
    return method.config.model_validate({"method": method.name, **method.example, **values})


def _settings(config: type[MethodConfig]) -> str:
    told = _attributes(config)
    rows = []
    for name, field in config.model_fields.items():
        if name == "method":
            continue
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        rows.append([f"`{name}`", _type(field.annotation), default, told.get(name, _BUDGETS.get(name, ""))])
    return _table(["setting", "type", "default", "meaning"], rows)


_BUDGETS = {
    "keep": "share of the FFN's parameters that stay, above 0 and at most 1",
    "sparsity": "share of the activations that are left out at run time, at least 0 and below 1",
    "symmetric": "no zero points",
}


def _attributes(config: type[MethodConfig]) -> dict[str, str]:
    """What the ``Attributes:`` sections of a configuration class and its bases say about each setting."""
    told: dict[str, str] = {}
    for base in reversed(config.__mro__):
        section = re.search(r"Attributes:\n((?:    .*\n|\n)*)", (inspect.getdoc(base) or "") + "\n")
        for line in section[1].split("\n") if section else ():
            if entry := re.fullmatch(r"    (\w+): (.*)", line):
                name = entry[1]
                told[name] = entry[2]
            elif line.startswith("     ") and told:
                told[name] += f" {line.strip()}"
    words = {"None": "`null`", "False": "`false`", "True": "`true`", "``": "`"}
    return {
        name: re.sub(r"\b(None|False|True)\b|``", lambda found: words[found[0]], text.rstrip("."))
        for name, text in told.items()
    }


def _type(annotation: Any) -> str:
    """A type as a reader of YAML sees it."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " ".join(f"`{value}`" for value in inside)
    if origin in (Union, types.UnionType):
        return " or ".join("`null`" if part is type(None) else _type(part) for part in inside)
    return {"float": "number", "int": "whole number", "bool": "`true` `false`", "str": "text"}.get(
        annotation.__name__, annotation.__name__
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
