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

from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.registry import Method, MethodConfig, methods
from ffsplit.pipeline.recipe import DEFAULT_BITS, PRESETS

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "methods.md"
RESULTS = DOCS.parent / "benchmarks" / "results" / "table.json"
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
"""

STORED = """
"plain transformers" means that the result loads without this package. It needs one width for all layers that share a
field of the configuration, and a field for that width: an override for some layers, or a family without such a field
(MPT, DINOv2, Swin), gives a checkpoint in ffsplit's format instead (see [checkpoint.md](checkpoint.md)). A budget that
leaves everything as it is gives a plain one with every method. "text: by settings": no text is needed for `rounding:
rtn`, nor for `score: magnitude` or `random` with `refit: false`.
"""

NOTES = {
    "ffsplit": """
With `keep`, the rest becomes by default one low-rank linear map of the input (`rest: linear`), to which a tenth of the
budget goes unless `heavy` says otherwise. `rest: svd` and `rest: whitened` keep the rest's neurons, at a low rank.

**It pays** under a `bits` budget: an eighth of the neurons in int8 and the rest in int3 (3.93 bits, all counted) reach
{ffsplit 12.5 % int8 + int3 gptq + refit}; GPTQ with 3 bits for all reaches {gptq 3 + refit} and with 4 bits
{gptq 4 + refit}, and without a split nothing lies between those two. It also pays wherever low rank is wanted: at
`keep` 0.75 plain SVD of everything gives {svd 0.75}, and 30 % heavy neurons beside the same SVD give
{ffsplit svd 30 % heavy 0.75}. The refit, which the paper does not have, moves 35 % heavy neurons beside a whitened rest
at `keep` 0.5 from {ffsplit whitened 35 % heavy 0.5} to {ffsplit whitened 35 % heavy + refit 0.5}.

**It does not pay** at the same `keep` against dropping the rest altogether and refitting `down`: `prune` with greedy
OBS gives {prune greedy OBS + refit 0.75} at 0.75 and {prune greedy OBS + refit 0.5} at 0.5, and its result needs no
ffsplit to load. The linear map at 0.5 gives {ffsplit linear 0.5} when the heavy neurons are chosen by output norm, and
{ffsplit linear OBS 0.5} by greedy OBS.
""",
    "prune": """
**It pays** when parameters have to go. Of what was measured in one pass it has the lowest perplexity at `keep` 0.75
({prune greedy OBS + refit 0.75}) and 0.5 ({prune greedy OBS + refit 0.5}). The result is an ordinary, narrower FFN that
any runtime makes faster, stored as a plain transformers checkpoint. The refit is most of it: by output norm at 0.75,
{prune output norm 0.75} without it and {prune output norm + refit 0.75} with it. Choosing the neurons jointly matters
more the less is kept: at 0.5, output norm gives {prune output norm + refit 0.5}, leverage
{prune leverage + refit 0.5}, forward selection {prune forward + refit 0.5}. The recipe's `drift` moves greedy OBS at
0.5 further, to {best: prune greedy OBS + refit 0.5, drift}.

**It does not pay** when memory is the only aim: 4-bit codes (4.31 bits of 16, all counted) give {gptq 4 + refit}, three
quarters of the neurons {prune greedy OBS + refit 0.75}. And refit and greedy selection fit the calibration text: on
other text (C4) greedy OBS at 0.75 gives {c4:prune greedy OBS + refit 0.75} and output norm
{c4:prune output norm + refit 0.75}, the other way round than on WikiText-2. Give them many more tokens than the FFN has
neurons, or switch `refit` off.
""",
    "quantize": """
**It pays** when memory or disk is the aim. With groups of 64, 4-bit codes take 4.31 stored bits per weight and 3-bit
codes 3.30. GPTQ gives {gptq 4} and {gptq 3}; with `down` refitted before it is rounded, {gptq 4 + refit} and
{gptq 3 + refit}. `rounding: rtn` needs no text at all and is good at 4 bits ({rtn 4}). GPTQ's rows were measured with
`polish: 0`; the default of 3 adds rounds of coordinate descent over scales and codes.

**It does not pay** at 3 bits without text ({rtn 3}), nor, as it stands, for speed: the forward decodes the matrix and
multiplies densely, which takes longer than the dense FFN.
""",
    "svd": """
**It pays** as a baseline and as a start for training: no text is needed, and it is quick.

**It does not pay** as a compressor by itself: the weights of an FFN have no low rank. At `keep` 0.75 the perplexity is
{svd 0.75}. A matrix gets smaller only below the rank `d_ff * d_model / (d_ff + d_model)`.
""",
    "whitened-svd": """
**It pays** over `svd` wherever there is text: at `keep` 0.75, {whitened svd 0.75} instead of {svd 0.75}, and with the
refit of `down` {whitened svd + refit 0.75}.

**It does not pay** against `prune`. At 0.75 pruning by plain output norm gives {prune output norm + refit 0.75}; at 0.5
it gives {prune output norm + refit 0.5}, whitened SVD {whitened svd 0.5} without and {whitened svd + refit 0.5} with
the refit. It also leans on the calibration text: on C4 it gives {c4:whitened svd + refit 0.75} at 0.75, pruning by
output norm {c4:prune output norm + refit 0.75}.
""",
}


def page() -> str:
    """The whole page."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    found = list(methods().values())
    parts = [HEAD, _status(found), _presets(), _protocol(results)]
    parts += [_section(method, results) for method in found]
    return "\n".join(parts).rstrip() + "\n"


def _status(found: list[Method]) -> str:
    rows = [
        [
            f"[`{method.name}`](#{method.name})",
            method.summary,
            method.paper,
            " or ".join(f"`{budget}`" for budget in method.budget),
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
        "`benchmarks/results/table.json` with their recipes. They are of one model with 135 million parameters."
    )
    return f"{_wrapped(words)}\n"


def _section(method: Method, results: dict[str, Any]) -> str:
    introduction = (
        f"## {method.name}\n\n{_sentence(method.summary)} Paper: {method.paper}. As a sum: {method.as_sum}.\n"
    )
    if method.name not in NOTES:
        raise KeyError(
            f"docs/generate.py has no note on the method {method.name!r}: say when it pays and when it does not"
        )
    return "\n".join([introduction, _settings(method.config), _wrapped(_filled(NOTES[method.name], results)), ""])


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


def needs_data(method: Method) -> str:
    """Whether fitting looks at text: always, never, or by settings."""
    answers = {_config(method, **extra).needs_data for extra in _variants(method)}
    return "by settings" if len(answers) > 1 else "needed" if answers == {True} else "not needed"


def stored_as(method: Method) -> str:
    """The kind of checkpoint that its structure leads to: plain transformers takes one dense branch, nothing else."""
    specs = [method.plan(SHAPE, _config(method, **extra)) for extra in _variants(method)]
    plain = [
        len(spec.branches) == 1 and spec.linear is None and all(part.kind == "dense" for part in spec.projections)
        for spec in specs
    ]
    return "plain transformers" if all(plain) else "by settings" if any(plain) else "ffsplit"


def _variants(method: Method) -> list[dict[str, Any]]:
    """Settings that may change what a method needs or gives."""
    budgets: list[dict[str, Any]] = [{"keep": 0.5} if budget == "keep" else {"bits": 4.0} for budget in method.budget]
    switches: list[dict[str, Any]] = [{}]
    if "rounding" in method.config.model_fields:
        switches.append({"rounding": "rtn"})
    if "score" in method.config.model_fields and "rest" not in method.config.model_fields:
        switches.append({"score": "magnitude", "refit": False})
    return [{**budget, **switch} for budget in budgets for switch in switches]


def _config(method: Method, **values: Any) -> MethodConfig:
    return method.config.model_validate({"method": method.name, **values})


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
    return {"float": "number", "int": "whole number", "bool": "`true` `false`"}.get(
        annotation.__name__, annotation.__name__
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
