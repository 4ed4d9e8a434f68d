"""The README.md of a checkpoint, in the format of the Hugging Face Hub."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from ffsplit.pipeline.plan import Plan

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_UNNAMED = "its base model"
_PAPER = "https://arxiv.org/abs/2401.04044"


def model_card(result_report: Mapping[str, Any], plan: Plan, recipe_yaml: str, base_model: str, stock: bool) -> str:
    """The text of a checkpoint's README.md.

    Args:
        result_report: ``report`` of a compression result.
        plan: what became of every FFN.
        recipe_yaml: what was asked for.
        base_model: hub id or place of the dense model; of a place only the last part is shown. May be empty.
        stock: whether plain transformers loads the checkpoint.
    """
    sections = [
        _header(base_model),
        _opening(base_model, stock),
        "## What was done\n\n" + _done(result_report, plan),
        "## Loading\n\n" + _loading(stock),
        "## Calibration\n\n" + _calibration(result_report),
        "## Limits\n\n" + _limits(result_report, plan),
        f"## Recipe\n\n```yaml\n{recipe_yaml.strip()}\n```",
        _made_with(result_report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def shown_name(model: str) -> str:
    """A hub id as it is; of a path only the last part, for the folders above are nobody else's business."""
    return model if is_hub_id(model) else Path(model).name


def is_hub_id(model: str) -> bool:
    """Whether a model's name can be a repository of the Hub: ``owner/name``, and no such path here."""
    return _HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def _header(base_model: str) -> str:
    fields: dict[str, Any] = {"library_name": "transformers"}
    if is_hub_id(base_model):
        fields["base_model"] = base_model
    fields["tags"] = ["ffsplit"]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _opening(base_model: str, stock: bool) -> str:
    name = shown_name(base_model)
    title = f"# {name or 'A model'}, feed-forward networks compressed"
    dense = f"`{name}`" if name else _UNNAMED
    needs = "It is a plain transformers checkpoint" if stock else "It loads in transformers once `ffsplit` is imported"
    return f"{title}\n\n{dense} compressed with `ffsplit` (after [FFSplit]({_PAPER})). {needs}."


def _done(report: Mapping[str, Any], plan: Plan) -> str:
    return "\n".join([_budget_table(report, plan), "", *_structure(plan), *_decision(report)])


def _budget_table(report: Mapping[str, Any], plan: Plan) -> str:
    budget = report.get("budget") or {}
    rows = [
        ("Share of the FFN parameters that stay", _percent(budget.get("keep_ffn", plan.keep))),
        ("... of the parameters of all linear layers", _percent(budget.get("keep_linear"))),
        ("... of all the model's parameters", _percent(budget.get("keep_model"))),
        ("Stored bits per FFN weight (scales and zeros counted, floats as 16 bits)",
         f"{budget.get('bits_ffn', plan.bits):.2f}"),
        ("FFNs that were worked on", f"{_changed(plan)} of {len(plan.ffns)}"),
        ("Attentions that were left out", _left_out(report.get("attention"))),
    ]  # fmt: skip
    return "\n".join(["| | |", "|---|---:|", *(f"| {label} | {value} |" for label, value in rows if value)])


def _left_out(gone: Mapping[str, Any] | None) -> str:
    if not gone:
        return ""
    return f"{len(gone['left_out'])} of {gone['of']} ({_percent(gone['share_of_model'])} of all the model's parameters)"


def _structure(plan: Plan) -> list[str]:
    """One line for each structure that occurs, most frequent first."""
    counts = Counter((ffn.method.method if ffn.method else None, ffn.spec.describe()) for ffn in plan.ffns)
    return [
        f"* {count} {'FFN' if count == 1 else 'FFNs'}, {f'method `{method}`' if method else 'untouched'}: {structure}."
        for (method, structure), count in counts.most_common()
    ]


def _decision(report: Mapping[str, Any]) -> list[str]:
    """What the allocator compared, if it decided."""
    plans = ((report.get("decision") or {}).get("allocation") or {}).get("plans") or ()
    kinds = {"allocation": "chosen layer by layer", "uniform": "the same for all layers"}
    told = []
    for plan in plans:
        measured = plan["measured_damage"]
        outcome = "" if measured is None else f", measured {measured:.4g}"
        told.append(f"{kinds[plan['plan']]} ({plan['cost']}) predicted {plan['predicted_damage']:.4g}{outcome}")
    return [f"* Decided by measuring. Damage to the final answers: {'; '.join(told)}."] if told else []


def _loading(stock: bool) -> str:
    first = "" if stock else "import ffsplit  # registers the format\n"
    code = (
        f"```python\n{first}from transformers import AutoModelForCausalLM  # or the Auto class of the model's task\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID")\n```'
    )
    if stock:
        return f"{code}\n\nNothing but transformers is needed."
    return (
        f"{code}\n\nInstall with `pip install ffsplit`. Without the import, loading raises an error and never gives a "
        "wrong model. `ffsplit.decompress(model)` turns it into dense weights that load without ffsplit."
    )


def _calibration(report: Mapping[str, Any]) -> str:
    data = report.get("calibration") or {}
    if not data:
        return "No text was used."
    amount = ", ".join(f"{data[key]:,} {key}" for key in ("samples", "tokens") if key in data)
    digest = f" (sha256 of the token ids `{data['sha256']}`)" if data.get("sha256") else ""
    return f"Text: `{data.get('source', 'unknown')}`, {amount or 'amount unknown'}{digest}. {_training(report)}"


def _training(report: Mapping[str, Any]) -> str:
    """What was trained after the fit, if anything was."""
    recovery = report.get("recovery")
    if not recovery:
        return "No weight was trained."
    text = recovery.get("text") or {}
    stages = ", ".join(f"`{stage['stage']}`" for stage in recovery.get("stages") or ())
    return (
        f"Then recovered (stages {stages}) on `{text.get('source', 'unknown')}`, {text.get('tokens', 0):,} tokens "
        f"(sha256 of the token ids `{text.get('sha256', 'unknown')}`)."
    )


def _limits(report: Mapping[str, Any], plan: Plan) -> str:
    lines = [
        "* The weights were fitted to the calibration text. On text of another language or domain the loss of quality "
        "can be larger.",
        "* No quality was measured when this was written. Measure it with `ffsplit eval DIR --against BASE`, on text "
        "that was not used above.",
        "* Everything that holds for the base model, its licence included, holds here too.",
    ]
    if worst := _errors(report):
        lines.insert(0, worst)
    uncovered = (report.get("coverage") or {}).get("covered_share_of_ffn", 1.0)
    if uncovered < 1.0:
        lines.insert(0, f"* Only {_percent(uncovered)} of the model's FFN parameters could be worked on.")
    return "\n".join(lines)


def _errors(report: Mapping[str, Any]) -> str:
    errors = {
        layer["ffn"]: float(layer["output_error"])
        for layer in report.get("layers") or ()
        if layer.get("output_error") is not None and math.isfinite(layer["output_error"])
    }
    if not errors:
        return ""
    worst = max(errors, key=errors.__getitem__)
    return (
        f"* Relative error of an FFN's output on the calibration text: median {median(errors.values()):.3f}, largest "
        f"{errors[worst]:.3f} (`{worst}`)."
    )


def _made_with(report: Mapping[str, Any]) -> str:
    made = report.get("provenance") or {}
    versions = ", ".join(f"{name} {version}" for name, version in (made.get("versions") or {}).items() if version)
    day = str(made.get("date") or "")[:10]
    seed = made.get("seed")
    parts = [day, versions, "" if seed is None else f"seed {seed}"]
    return "Made " + "; ".join(part for part in parts if part) + "." if any(parts) else ""


def _changed(plan: Plan) -> int:
    return sum(ffn.method is not None for ffn in plan.ffns)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
