"""What a compression gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ffsplit.families.site import FFNSite
from ffsplit.pipeline.plan import Plan
from ffsplit.pipeline.recipe import Recipe

PLAN_FILE, RECIPE_FILE, REPORT_FILE = "ffsplit_plan.json", "ffsplit_recipe.yaml", "ffsplit_report.json"
"""What a checkpoint holds of a result beside the model."""


@dataclass
class CompressionResult:
    """A compressed model and everything that a reader needs to trust it.

    Attributes:
        model: the model that was given, its FFNs replaced in place.
        plan: what became of every FFN.
        recipe: what was asked for.
        report: figures as plain values: budget reached, coverage, per-layer errors, data, versions, hardware.
        tokenizer: saved beside the model when there is one.
    """

    model: PreTrainedModel
    plan: Plan
    recipe: Recipe
    report: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any | None = None

    @property
    def sites(self) -> list[FFNSite]:
        return [FFNSite.from_dict(ffn.site) for ffn in self.plan.ffns]
