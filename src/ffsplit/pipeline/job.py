"""The state of one compression and the report on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ffsplit.calibrate.batches import Batches
from ffsplit.families import FFNs
from ffsplit.families.projection import is_projection
from ffsplit.methods.registry import MethodConfig
from ffsplit.pipeline.plan import Plan
from ffsplit.pipeline.recipe import Recipe
from ffsplit.provenance import provenance

Progress = Callable[[str, int, int], None]


@dataclass
class Job:
    """One compression under way.

    Attributes:
        linear_parameters: of all linear layers of the dense model but its output head.
        notes: one entry per finished FFN, in the order of execution.
    """

    model: PreTrainedModel
    found: FFNs
    recipe: Recipe
    plan: Plan
    configs: list[MethodConfig | None]
    data: Batches
    device: torch.device
    progress: Progress | None
    model_sha256: str
    linear_parameters: int
    notes: list[dict[str, Any]] = field(default_factory=list)

    def identity(self) -> dict[str, Any]:
        """What an interrupted run and its continuation must share."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "model": self.model_sha256,
            "data": self.data.sha256,
            "dtype": str(self.model.dtype),
            "plan": self.plan.model_dump(mode="json")["ffns"],
        }


def make_report(job: Job, seconds: float) -> dict[str, Any]:
    """The figures of a run, as plain values."""
    coverage = job.found.coverage
    linear = job.linear_parameters
    dense = sum(ffn.dense_shape.parameters for ffn in job.plan.ffns)
    kept = sum(ffn.spec.parameters for ffn in job.plan.ffns)
    return {
        "coverage": {
            "ffns": len(job.found.sites),
            "covered_share_of_ffn": coverage.covered_share_of_ffn,
            "ffn_share_of_model": coverage.ffn_share_of_model,
            "uncovered_notes": list(coverage.notes),
        },
        "budget": {
            "keep_ffn": kept / dense,
            "keep_linear": (linear - dense + kept) / linear,
            "keep_model": (coverage.model_parameters - dense + kept) / coverage.model_parameters,
            "bits_ffn": job.plan.bits,
        },
        "calibration": job.data.describe(),
        "layers": job.notes,
        "seconds": round(seconds, 1),
        "provenance": provenance(seed=job.recipe.seed, data={"calibration": job.data.sha256})
        | {"model_sha256": job.model_sha256},
    }


def linear_parameters(model: PreTrainedModel) -> int:
    """Parameters of all linear layers but the output head; call before FFNs are replaced."""
    head = model.get_output_embeddings()
    return sum(
        parameter.numel()
        for module in model.modules()
        if is_projection(module) and module is not head
        for parameter in module.parameters(recurse=False)
    )
