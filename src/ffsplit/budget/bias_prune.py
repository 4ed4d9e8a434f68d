"""Biases that FFNs can do without: removed where the output on text stays what it was, up to a tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch.nn.functional import linear

from ffsplit.budget.registry import Decision, PlannerConfig, planner
from ffsplit.budget.scene import Scene
from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import ModelError
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.unbias import UnbiasConfig, without_biases


class BiasPruneConfig(PlannerConfig):
    """Which biases may go, and how much of an FFN's output with them. There is no budget: what goes follows.

    Attributes:
        tolerance: biases go while the FFN's output on the calibration text changes by less than this share of its norm,
            all that go from one FFN taken together.
        up: those of `up` and `gate` may go, together.
        down: that of `down` may go.
    """

    method: Literal["bias-prune"] = "bias-prune"
    tolerance: float = Field(0.01, gt=0)
    up: bool = True
    down: bool = True

    @model_validator(mode="after")
    def _something_may_go(self) -> BiasPruneConfig:
        if not (self.up or self.down):
            raise ValueError("up and down are both false, so no bias may go")
        return self


def removals(shape: FFNShape, config: BiasPruneConfig) -> list[UnbiasConfig]:
    """What may be removed from an FFN, the most parameters first."""
    inner, outer = shape.d_ff * shape.neuron_biases * config.up, shape.d_model * shape.down_bias * config.down
    options = [(inner + outer, True, True), (inner, True, False), (outer, False, True)]
    exist = [option for option in options if (inner or not option[1]) and (outer or not option[2])]
    return [UnbiasConfig(up=up, down=down) for _, up, down in sorted(exist, key=lambda option: -option[0])]


def check(shapes: Sequence[FFNShape], config: BiasPruneConfig) -> None:
    """Refuse a model without any such bias.

    Raises:
        ModelError: there is none.
    """
    if not any(removals(shape, config) for shape in shapes):
        asked = " or ".join(name for name, may in (("up/gate", config.up), ("down", config.down)) if may)
        raise ModelError(f"the FFNs of this model have no bias of {asked}, so there is nothing to prune")


@dataclass(frozen=True)
class Worth:
    """What the biases of one FFN are worth on its calibration inputs.

    Attributes:
        energy: the norm of each bias beside the mean norm of what it is added to, ``|b| / E|x W^T|``.
        errors: of the FFN's output without them, relative to its norm, one for every removal asked about.
    """

    energy: dict[str, float]
    errors: tuple[float, ...]


@torch.no_grad()
def worth(data: LayerData, options: Sequence[UnbiasConfig]) -> Worth:
    """Measure the biases of one FFN.

    Args:
        data: the FFN and its inputs.
        options: removals whose errors are wanted.

    Raises:
        ModelError: no token reached the FFN.
    """
    ffn = data.ffn
    variants = [without_biases(ffn, up=option.up, down=option.down) for option in options]
    missed = torch.zeros(len(options), dtype=torch.float64, device=ffn.up.device)
    energy, sizes, tokens = missed.new_zeros(()), missed.new_zeros(3), 0
    for x in data.chunks():
        hidden, y = ffn.hidden(x), ffn(x).double()
        energy += y.square().sum()
        for index, variant in enumerate(variants):
            missed[index] += (variant(x) - y).square().sum()
        for index, (inputs, weight) in enumerate(((x, ffn.up), (x, ffn.gate), (hidden, ffn.down))):
            if weight is not None:
                sizes[index] += linear(inputs, weight).double().norm(dim=1).sum()
        tokens += len(x)
    if not tokens:
        raise ModelError(f"{data.name}: the calibration text never reached this FFN")
    tiny = torch.finfo(torch.float64).tiny
    biases = {"up": ffn.up_bias, "gate": ffn.gate_bias, "down": ffn.down_bias}
    return Worth(
        {
            name: float(bias.double().norm() * tokens / size.clamp_min(tiny))
            for (name, bias), size in zip(biases.items(), sizes, strict=True)
            if bias is not None
        },
        tuple((missed / energy.clamp_min(tiny)).sqrt().tolist()),
    )


@planner(
    "bias-prune",
    summary="remove the biases of FFNs whose output on text hardly changes without them",
    paper="models trained without biases (T5; Cramming, arXiv 2212.14034); removing them by measurement is ours",
    budget=(),
    as_sum="one dense branch of all neurons, fewer biases",
    config=BiasPruneConfig,
    check=check,
    status="experimental",
)
def bias_prune(scene: Scene, config: BiasPruneConfig) -> Decision:
    """Of every FFN the most biases go whose loss stays below the tolerance, on the dense model's inputs.

    Raises:
        ModelError: no bias of any FFN may go; the message has the smallest error of each.
    """
    # An FFN that keeps its biases becomes a dense sum: a model of nothing but dense sums is a plain checkpoint.
    decision = [UnbiasConfig()] * len(scene.shapes)
    least: dict[int, float] = {}
    scene.notes["bias_energy"] = {}
    for index, data in scene.layers():
        options = removals(scene.shapes[index], config)
        if not options:
            continue
        found = worth(data, options)
        scene.notes["bias_energy"][data.name] = found.energy
        least[index] = min(found.errors)
        fitting = (option for option, error in zip(options, found.errors, strict=True) if error < config.tolerance)
        decision[index] = next(fitting, UnbiasConfig())
    if all(chosen.full_budget for chosen in decision):
        measured = ", ".join(f"{index}: {error:.4f}" for index, error in sorted(least.items()))
        raise ModelError(
            f"no FFN can do without a bias at tolerance={config.tolerance}. Smallest relative change of the output of "
            f"each when one goes: {measured}"
        )
    return list(decision)
