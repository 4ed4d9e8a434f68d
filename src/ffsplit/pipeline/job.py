"""The state of one compression and the report on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ffsplit.budget.registry import Decision
from ffsplit.budget.scene import Scene, Trial
from ffsplit.calibrate.batches import Batches
from ffsplit.calibrate.gradients import NeuronGradients, collect_gradients
from ffsplit.families import AttentionSite, FFNs
from ffsplit.families.attention import attention_parameters
from ffsplit.families.centring import NormCentring
from ffsplit.families.norms import NormFold
from ffsplit.families.projection import is_projection
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.registry import MethodConfig
from ffsplit.pipeline.plan import Plan, PlannedAttention, make_plan
from ffsplit.pipeline.recipe import Recipe
from ffsplit.provenance import provenance, versions

Progress = Callable[[str, int, int], None]


@dataclass
class Job:
    """One compression under way.

    Attributes:
        shapes: of the FFNs, in the order of execution.
        linear_parameters: of all linear layers of the dense model but its output head.
        configs: the method of every FFN; empty until :meth:`settle`.
        plan: what every FFN becomes; empty until :meth:`settle`.
        decision: what a planner says about its decision, as plain values.
        notes: one entry per finished FFN, in the order of execution.
        gradients: of the dense model's loss, by the FFN's name; empty until :meth:`take_gradients` was needed.
        folds: what became of the norms in front of the FFNs, when the recipe folds them.
        centrings: what became of the outputs of the FFNs, when the recipe centres them.
        attention: the attentions that the planner may leave out.
    """

    model: PreTrainedModel
    found: FFNs
    shapes: tuple[FFNShape, ...]
    recipe: Recipe
    data: Batches
    device: torch.device
    progress: Progress | None
    model_sha256: str
    linear_parameters: int
    configs: Decision = field(default_factory=list)
    plan: Plan = field(default_factory=lambda: Plan(ffns=()))
    decision: dict[str, Any] = field(default_factory=dict)
    notes: list[dict[str, Any]] = field(default_factory=list)
    folds: tuple[NormFold, ...] = ()
    centrings: tuple[NormCentring, ...] = ()
    attention: tuple[AttentionSite, ...] = ()
    gradients: dict[str, NeuronGradients] = field(default_factory=dict)

    def settle(self, configs: Decision, left_out: Sequence[int] = ()) -> None:
        """Fix what happens to every FFN, and which attentions go. These must still be in their places.

        Raises:
            RecipeError: nothing would change.
            BudgetError: a budget is out of reach.
        """
        self.plan = make_plan(self.found.sites, self.shapes, configs, [self._planned(place) for place in left_out])
        self.configs = configs

    def _planned(self, place: int) -> PlannedAttention:
        parameters, linear = attention_parameters(self.model, self.attention[place])
        return PlannedAttention(site=self.attention[place], parameters=parameters, linear_parameters=linear)

    def take_gradients(self, configs: Iterable[MethodConfig | None]) -> None:
        """Run the dense model back, once, if any of the methods looks at gradients. No FFN may be replaced yet.

        Raises:
            ModelError: the model has no loss.
        """
        if not self.gradients and any(config is not None and config.needs_gradients for config in configs):
            self.gradients = collect_gradients(
                self.model, self.found.sites, self.data.batches, self.device, self.progress
            )

    def scene(self, store: Path | None, trial: Trial | None) -> Scene:
        """What a planner may look at; ``store`` is where its measurements outlast a killed run."""
        settled = self.recipe.overridden(len(self.shapes))
        self.take_gradients([self.recipe.planner, *settled.values()])
        return Scene(
            self.model,
            self.found,
            self.shapes,
            self.data,
            self.device,
            self.recipe.seed,
            store,
            self.progress,
            trial,
            gradients=self.gradients,
            attention=self.attention,
            settled=settled,
        )

    def identity(self) -> dict[str, Any]:
        """What an interrupted run and its continuation must share; what a planner decides follows from the rest."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "model": self.model_sha256,
            "data": self.data.sha256,
            "dtype": str(self.model.dtype),
            "plan": self.plan.model_dump(mode="json")["ffns"],
            "versions": versions(),
        }


def make_report(job: Job, seconds: float) -> dict[str, Any]:
    """The figures of a run, as plain values."""
    coverage = job.found.coverage
    return {
        "coverage": {
            "ffns": len(job.found.sites),
            "covered_share_of_ffn": coverage.covered_share_of_ffn,
            "ffn_share_of_model": coverage.ffn_share_of_model,
            "uncovered_notes": list(coverage.notes),
        },
        "budget": budget_of(job.plan, job.linear_parameters, coverage.model_parameters),
        **({"attention": _attention(job)} if job.plan.attention else {}),
        "calibration": job.data.describe(),
        **({"decision": job.decision} if job.decision else {}),
        "layers": job.notes,
        "folded_norms": [asdict(fold) for fold in job.folds],
        "centred_ffns": [asdict(centring) for centring in job.centrings],
        "seconds": round(seconds, 1),
        "provenance": provenance(seed=job.recipe.seed, data={"calibration": job.data.sha256})
        | {"model_sha256": job.model_sha256},
    }


def budget_of(plan: Plan, linear: int, model: int) -> dict[str, float]:
    """What a plan leaves, as shares.

    Args:
        plan: of every FFN.
        linear: parameters of all linear layers of the dense model but its output head.
        model: parameters of the dense model.
    """
    dense, kept, gone = plan.dense_parameters, plan.parameters, plan.attention
    return {
        "keep_ffn": kept / dense,
        "keep_linear": (linear - dense + kept - sum(one.linear_parameters for one in gone)) / linear,
        "keep_model": (model - dense + kept - sum(one.parameters for one in gone)) / model,
        "bits_ffn": plan.bits,
    }


def _attention(job: Job) -> dict[str, Any]:
    """Which attentions were left out, and how much of the model they were: no budget counts them."""
    gone = job.plan.attention
    parameters = sum(one.parameters for one in gone)
    return {
        "left_out": [one.site.name for one in gone],
        "of": len(job.attention),
        "parameters": parameters,
        "share_of_model": parameters / job.found.coverage.model_parameters,
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
