"""Letting a planner decide over the FFNs, once: a resumed run takes the decision from its journal."""

from __future__ import annotations

from ffsplit.budget.registry import Decision, planners
from ffsplit.methods.registry import method_config
from ffsplit.pipeline.job import Job
from ffsplit.pipeline.journal import Journal


def decide(job: Job, log: Journal | None) -> Decision:
    """The method of every FFN, as the recipe's planner finds best on the dense model.

    Raises:
        FFSplitError: what the planner refuses.
    """
    config = job.recipe.planner
    assert config is not None
    if log is not None and (kept := log.kept("decision")) is not None:
        return [None if values is None else method_config(values) for values in kept]
    scene = job.scene(None if log is None else log.folder("measured"))
    decided = planners()[config.method].decide(scene, config)
    if log is not None:
        log.keep("decision", [None if one is None else one.model_dump(mode="json") for one in decided])
    return decided
