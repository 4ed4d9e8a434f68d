"""``ffsplit methods``: the registry."""

from __future__ import annotations

from typing import Any

from ffsplit.cli import options, tables
from ffsplit.cli.console import print_json


def methods(as_json: options.Json = False) -> None:
    """List the methods: what they do, where they come from, which budget they take."""
    from ffsplit.budget.registry import entries
    from ffsplit.pipeline.recipe import PRESETS

    rows = [_row(found) for found in entries().values()]
    if as_json:
        print_json({"methods": rows, "presets": PRESETS})
        return
    tables.show(
        "Methods",
        ("method", "what it does", "as a sum of branches", "paper", "budget", "needs", "status"),
        [
            (
                row["name"],
                row["summary"],
                row["as_sum"],
                row["paper"],
                " or ".join(row["budget"]),
                "text" if row["needs_data"] else "no text",
                row["status"],
            )
            for row in rows
        ],
        words=7,
    )
    tables.show(
        "Presets",
        ("recipe", "settings"),
        [(name, ", ".join(f"{key}={value}" for key, value in preset.items())) for name, preset in PRESETS.items()],
        words=2,
    )


def _row(found: Any) -> dict[str, Any]:
    from ffsplit.methods.registry import EXAMPLE_BUDGETS

    budget = {name: EXAMPLE_BUDGETS[name] for name in found.budget[:1]}
    config = found.config.model_validate({"method": found.name, **budget, **found.example})
    return {
        "name": found.name,
        "summary": found.summary,
        "paper": found.paper,
        "budget": list(found.budget),
        "as_sum": found.as_sum,
        "needs_data": config.needs_data,
        "status": found.status,
        "settings": found.config.model_json_schema()["properties"],
    }
