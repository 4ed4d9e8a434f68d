"""``ffsplit compress --pareto``: the front of damage over cost, and checkpoints of some budgets on it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffsplit.cli import checks
from ffsplit.cli.allocation import damage
from ffsplit.cli.console import print_json, quiet, say
from ffsplit.cli.ours import FRONT
from ffsplit.cli.progress import Report, reporting
from ffsplit.cli.resuming import resumable
from ffsplit.cli.run import Run
from ffsplit.cli.tables import line, show
from ffsplit.plain import plain

if TYPE_CHECKING:
    from ffsplit.pipeline.recipe import Recipe

ROWS = 16


def write_front(run: Run, recipe: Recipe, budgets: list[str], *, own: bool, as_json: bool) -> None:
    """Measure, allocate under every budget, carry some out; the output appears when all of it is done.

    Args:
        run: what the command line said.
        recipe: of the planner `auto`.
        budgets: in words; those with a value become checkpoints.
        own: without budgets, whether the recipe's own says which kind is meant.
        as_json: print the document and no tables.
    """
    from ffsplit.pipeline.pareto import front_of, recipe_along

    along, axis = recipe_along(recipe, budgets, own=own)
    work = run.journal
    run = replace(run, measured=run.measured or work / "measurements")
    with quiet(), reporting() as report, resumable(work):
        document = front_of(
            run.model,
            recipe=along,
            axis=axis,
            journal=work,
            device=run.device,
            dtype=run.dtype,
            measured=run.measured,
            progress=report,
        )
        folders = {budget: budget.replace("=", "-", 1) for budget in axis.budgets}
        entries = [_checkpoint(run, recipe, *one, work, report) for one in folders.items()]
        document = plain({**document, "checkpoints": entries})
        _publish(document, work / "output", run, list(folders.values()))
        shutil.rmtree(work, ignore_errors=True)
    if as_json:
        print_json(document)
    else:
        show_front(document, run.out)


def _checkpoint(run: Run, recipe: Recipe, budget: str, name: str, work: Path, report: Report) -> dict[str, Any]:
    """Carry one budget out, unless an interrupted run did; what the front says about it."""
    from ffsplit.pipeline.recipe import load_recipe
    from ffsplit.pipeline.result import REPORT_FILE

    folder, journal = work / "output" / name, work / f"run-{name}"
    if not folder.is_dir():
        say(f"compressing to {budget}")
        result = run.compressed(load_recipe(recipe, budget=budget), journal, report)
        say(f"saving {name}")
        run.save(result, folder)
    shutil.rmtree(journal, ignore_errors=True)
    told = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    allocation = told.get("decision", {}).get("allocation", {"plans": [], "chosen": None})
    chosen = [plan for plan in allocation["plans"] if plan["plan"] == allocation["chosen"]]
    facts = chosen[0] if chosen else dict.fromkeys(("value", "cost", "predicted_damage", "measured_damage"))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"budget": budget, "directory": name, "bytes": size, **facts}


def _publish(document: Mapping[str, Any], folder: Path, run: Run, wanted: Sequence[str]) -> None:
    """Put the output in its place, with nothing in it that an earlier, killed run left."""
    from ffsplit.checkpoint.save import publish
    from ffsplit.report.front import front_figure
    from ffsplit.report.plots import save_figure

    folder.mkdir(exist_ok=True)
    for left in folder.iterdir():
        if left.is_dir() and left.name not in wanted:
            shutil.rmtree(left)
    (folder / FRONT).write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
    save_figure(front_figure(document), folder / "pareto")
    checks.check_output(run.out, overwrite=run.overwrite, mark=FRONT)  # again: files may have come there
    target = run.out.resolve()
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    publish(folder, target)


def show_front(document: Mapping[str, Any], out: Path) -> None:
    """The front, some of its points where it has many, and the checkpoints."""
    points = document["points"]
    step = -(-len(points) // ROWS)
    shown = [*points[:-1:step], points[-1]]
    title = f"Front of predicted damage ({document['metric']}) over cost, {len(shown)} of {len(points)} points"
    show(title, ("cost", "predicted damage", "FFNs"), list(_rows(shown, document["choices"])), words=1)
    if document["checkpoints"]:
        show(
            "Checkpoints",
            ("budget", "directory", "cost", "predicted damage", "measured damage"),
            [
                (
                    one["budget"],
                    str(out / one["directory"]),
                    one["cost"] or "as it is",
                    damage(one["predicted_damage"]),
                    damage(one["measured_damage"]),
                )
                for one in document["checkpoints"]
            ],
            words=3,
        )
    line(f"Every point with its choices: {out / FRONT}; plot: {out / 'pareto.svg'}")


def _rows(
    points: Sequence[Mapping[str, Any]], choices: Sequence[Mapping[str, Any] | None]
) -> Iterator[tuple[str, ...]]:
    for point in points:
        chosen = [choices[index] for index in point["layers"]]
        methods = Counter("as it is" if one is None else one["method"] for one in chosen)
        words = ", ".join(f"{count} {name}" for name, count in methods.most_common())
        yield point["cost"], damage(point["predicted_damage"]), words
