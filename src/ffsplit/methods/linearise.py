"""Activation removal: neurons that are nearly linear where the text uses them become one linear map."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import linear

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.assemble import AffineStart, Part, fit_parts
from ffsplit.methods.heavy_map import heavy_and_map
from ffsplit.methods.registry import KeepConfig, method
from ffsplit.ops.affine_activation import (
    ActivationMoments,
    AffineActivation,
    collapsed_neurons,
    fit_affine_activation,
)
from ffsplit.ops.linalg import schur_complement
from ffsplit.ops.selection import greedy_obs_order


class LineariseConfig(KeepConfig):
    """Which neurons keep their activation.

    Attributes:
        score: ``residual`` keeps the neurons whose own straight line misses the most output; ``greedy_obs`` chooses
            jointly, among what no linear map of the input explains.
        heavy: share (below 1) or number of neurons that stay; null gives the map a tenth of the budget.
        refit: fit `down`, the linear map and the bias to the dense outputs by least squares; false takes the sum of
            the neurons' straight lines as it is.
        ridge: pull of that fit to the old weights and to the sum of the straight lines.
    """

    method: Literal["linearise"] = "linearise"
    score: Literal["residual", "greedy_obs"] = "residual"
    heavy: float | None = Field(None, ge=0)
    refit: bool = True
    ridge: float = Field(1e-3, ge=0)

    @model_validator(mode="after")
    def _whole_neurons(self) -> LineariseConfig:
        if self.heavy is not None and self.heavy >= 1 and self.heavy != int(self.heavy):
            raise ValueError("heavy is a share below 1 or a whole number of neurons")
        return self


def structure(shape: FFNShape, config: LineariseConfig) -> SumSpec:
    """Heavy neurons, a linear map, and a bias, because straight lines have intercepts."""
    return heavy_and_map(shape, config.keep, config.heavy, bias=True)


@torch.no_grad()
def activation_moments(data: LayerData) -> ActivationMoments:
    """What the activation of every neuron sees and gives on the calibration inputs."""
    ffn = data.ffn
    moments = ActivationMoments.zeros(ffn.d_ff, ffn.up.device)
    for x in data.chunks():
        up = linear(x, ffn.up, ffn.up_bias)
        g = up if ffn.gate is None else linear(x, ffn.gate, ffn.gate_bias)
        moments.update(g, ffn.act(g), None if ffn.gate is None else up)
    return moments


@method(
    "linearise",
    summary="neurons whose activation is nearly a straight line become one linear map",
    paper="least-squares removal of activations (ours; cf. GLU Variants 2002.05202)",
    budget=("keep",),
    as_sum="heavy: dense + linear map + bias",
    config=LineariseConfig,
    structure=structure,
    status="experimental",
)
def linearise(data: LayerData, config: LineariseConfig) -> SumFFN:
    """Keep the neurons that are least linear in the input; the others start as the sum of their lines."""
    ffn = data.ffn
    spec = structure(FFNShape.of(ffn), config)
    # A gated neuron is linear in x only where its activation is a constant.
    fitted = fit_affine_activation(activation_moments(data), slope=not ffn.gated)
    if config.score == "greedy_obs":
        heavy = greedy_obs_order(unexplained_gram(data), ffn.down, spec.neurons)
    else:
        heavy = torch.argsort(fitted.loss(ffn.down), descending=True, stable=True)[: spec.neurons]
    parts = [Part(heavy, branch) for branch in spec.branches]
    start = collapsed(data, fitted, heavy)
    return fit_parts(data, parts, spec, refit=config.refit, ridge=config.ridge, start=start)


def collapsed(data: LayerData, fitted: AffineActivation, heavy: Int[Tensor, " heavy"]) -> AffineStart:
    """The sum of the straight lines of all neurons but the heavy ones."""
    left = torch.ones(data.ffn.d_ff, dtype=torch.bool, device=heavy.device)
    left[heavy] = False
    light = left.nonzero().flatten()
    ffn, lines = data.ffn.take(light), fitted.take(light)
    scale, shift = (lines.shift, None) if ffn.gated else (lines.scale, lines.shift)
    weight, bias = collapsed_neurons(ffn.up, ffn.up_bias, ffn.down, scale, shift)
    return AffineStart(bias, weight)


def unexplained_gram(data: LayerData) -> Float[Tensor, "d_ff d_ff"]:
    """The hidden Gram less what the best affine map of the input explains."""
    ffn = data.ffn

    @torch.no_grad()
    def columns(x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens columns"]:
        return torch.cat([x.new_ones(x.shape[0], 1), x, ffn.hidden(x)], dim=1)

    known = slice(0, 1 + ffn.d_model)
    return schur_complement(data.refit_sums(columns).gram, known, slice(known.stop, None), 0.0)
