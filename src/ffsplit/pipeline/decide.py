"""Letting a planner decide over the FFNs, once: a resumed run takes the decision from its journal."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ffsplit.budget.registry import Decision, planners
from ffsplit.budget.scene import Trial
from ffsplit.families.surgery import originals, restore
from ffsplit.methods.registry import MethodConfig, method_config
from ffsplit.pipeline.fit import fit_all
from ffsplit.pipeline.job import Job
from ffsplit.pipeline.journal import Journal, fingerprint


def settle_by_planner(
    job: Job, log: Journal, cache_dir: str | Path | None, measured: str | Path | None = None
) -> Journal:
    """Settle a job on what its recipe's planner finds best on the dense model.

    Args:
        job: settled here.
        log: its journal; a decision that is in it is not made again.
        cache_dir: for the fits of what is tried out.
        measured: directory of measurements that outlast this job, or None.

    Returns:
        The journal of the fits to come; those that the planner tried out are in it already.

    Raises:
        FFSplitError: what the planner refuses.
    """
    config = job.recipe.planner
    assert config is not None
    kept = log.kept("decision")
    if kept is None:
        scene = job.scene(_store(job, log, measured), _trial(job, log, cache_dir))
        decided = planners()[config.method].decide(scene, config)
        kept = {"methods": _plain(decided), "notes": scene.notes, "left_out": scene.left_out}
        log.keep("decision", kept)
    decided = [None if values is None else method_config(values) for values in kept["methods"]]
    job.decision = kept["notes"]
    job.settle(job.recipe.methods_for(len(job.shapes), decided), kept["left_out"])
    fits = _fits(job, log)
    for other in log.directory.glob("fits-*"):
        if other != fits.directory:
            shutil.rmtree(other)
    return fits


def _store(job: Job, log: Journal, measured: str | Path | None) -> Path:
    """Where measurements are kept: what they depend on is part of the name, so that none is taken for another's."""
    if measured is None:
        return log.folder("measured")
    identity = job.identity()
    parts = {name: identity[name] for name in ("model", "data", "dtype", "versions")}
    # The model's hash is that of the model as it came, and folding and centring change damages. Some methods draw
    # random numbers.
    # Measurements are of so many batches, and the data's hash does not tell their size.
    settings = {name: getattr(job.recipe, name) for name in ("fold_norms", "centre_norms", "seed")}
    parts |= {name: value for name, value in settings.items() if value}
    if job.recipe.calibration.batch_size > 1:
        parts["batch_size"] = job.recipe.calibration.batch_size
    folder = Path(measured) / fingerprint(parts)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _trial(job: Job, log: Journal, cache_dir: str | Path | None) -> Trial:
    """A function that carries a decision out, measures, and puts the dense FFNs back."""

    def run(decision: Sequence[MethodConfig | None], score: Callable[[], float]) -> float:
        job.settle(job.recipe.methods_for(len(job.shapes), list(decision)))
        fits = _fits(job, log)
        known = fits.kept("score")
        if known is None:
            dense = [originals(job.model, site) for site in job.found.sites]
            try:
                fit_all(job, fits, cache_dir)
                known = score()
            finally:
                for taken in dense:
                    restore(job.model, taken)
                job.notes.clear()
            fits.keep("score", known)
        return float(known)

    return run


def _fits(job: Job, log: Journal) -> Journal:
    """The journal of the fits of a settled job, inside that of its decision."""
    parts: dict[str, object] = {"methods": _plain(job.configs)}
    if job.plan.attention:
        parts["attention"] = [gone.site.name for gone in job.plan.attention]
    return Journal(log.folder(f"fits-{fingerprint(parts)[:16]}"), parts)


def _plain(decision: Decision) -> list[dict[str, object] | None]:
    return [None if one is None else one.model_dump(mode="json") for one in decision]
