"""Neurons whose activation is close to a straight line where the text uses it, and what they become without it.

A neuron is linearised by ``act(g) ~ scale * g + shift``. In a gated FFN the output is ``act(g) u``, so the line is
fitted with the weight ``u^2``: what counts is the error of the product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ffsplit.ops.scores import output_norm

# Inputs that vary by less than this share of their own energy are constant: float32 has no more digits.
CONSTANT = 1e-12


@dataclass
class ActivationMoments:
    """Weighted sums over tokens of the activation's inputs ``g`` and outputs ``a``, float64, one each a neuron.

    Attributes:
        weight: sum of the weights.
        g: sum of ``g``.
        a: sum of ``a``.
        gg: sum of ``g^2``.
        ga: sum of ``g a``.
        aa: sum of ``a^2``.
    """

    weight: Float[Tensor, " neurons"]
    g: Float[Tensor, " neurons"]
    a: Float[Tensor, " neurons"]
    gg: Float[Tensor, " neurons"]
    ga: Float[Tensor, " neurons"]
    aa: Float[Tensor, " neurons"]

    @classmethod
    def zeros(cls, neurons: int, device: torch.device | str = "cpu") -> ActivationMoments:
        return cls(*(torch.zeros(neurons, dtype=torch.float64, device=device) for _ in range(6)))

    def update(
        self,
        g: Float[Tensor, "tokens neurons"],
        a: Float[Tensor, "tokens neurons"],
        u: Float[Tensor, "tokens neurons"] | None = None,
    ) -> None:
        """Add the tokens of a chunk.

        Args:
            g: inputs of the activation.
            a: its outputs.
            u: what the outputs are multiplied by, in a gated FFN.
        """
        g, a = g.double(), a.double()
        weight = torch.ones_like(g) if u is None else u.double().square()
        self.weight += weight.sum(0)
        for total, values in ((self.g, g), (self.a, a), (self.gg, g * g), (self.ga, g * a), (self.aa, a * a)):
            total += (weight * values).sum(0)


@dataclass(frozen=True)
class AffineActivation:
    """``act(g) ~ scale * g + shift`` for every neuron, float64.

    Attributes:
        scale: slopes.
        shift: intercepts.
        residual: sum over tokens of the squared error that it makes in the hidden activation.
    """

    scale: Float[Tensor, " neurons"]
    shift: Float[Tensor, " neurons"]
    residual: Float[Tensor, " neurons"]

    def loss(self, down: Float[Tensor, "d_model neurons"]) -> Float[Tensor, " neurons"]:
        """``||h_j - h'_j|| ||down_j||``: the output error of linearising neuron j alone."""
        return output_norm(self.residual, down)

    def take(self, neurons: Int[Tensor, " kept"]) -> AffineActivation:
        """The lines of some of the neurons, in the given order."""
        return AffineActivation(self.scale[neurons], self.shift[neurons], self.residual[neurons])

    def folded(
        self, weight: Float[Tensor, "neurons d_model"], bias: Float[Tensor, " neurons"] | None
    ) -> tuple[Float[Tensor, "neurons d_model"], Float[Tensor, " neurons"]]:
        """Weight and bias of ``scale * (x weight^T + bias) + shift``, in the dtype of ``weight``."""
        shift = self.shift if bias is None else self.shift + self.scale * bias.double()
        return (self.scale[:, None] * weight.double()).to(weight), shift.to(weight)


def fit_affine_activation(moments: ActivationMoments, *, slope: bool = True) -> AffineActivation:
    """The least-squares line of every neuron, or with ``slope=False`` the least-squares constant.

    A neuron that never varies gets the constant; one without any weight gets zero.
    """
    weight = torch.where(moments.weight > 0, moments.weight, 1.0)
    mean_g, mean_a = moments.g / weight, moments.a / weight
    variance = (moments.gg - moments.g * mean_g).clamp_min(0)
    spread = (moments.aa - moments.a * mean_a).clamp_min(0)
    if not slope:
        return AffineActivation(torch.zeros_like(mean_a), mean_a, spread)
    covariance = moments.ga - moments.g * mean_a
    varies = variance > CONSTANT * moments.gg
    scale = torch.where(varies, covariance / torch.where(varies, variance, 1.0), 0.0)
    return AffineActivation(scale, mean_a - scale * mean_g, (spread - scale * covariance).clamp_min(0))


def collapsed_neurons(
    up: Float[Tensor, "neurons d_model"],
    up_bias: Float[Tensor, " neurons"] | None,
    down: Float[Tensor, "d_model neurons"],
    scale: Float[Tensor, " neurons"],
    shift: Float[Tensor, " neurons"] | None = None,
) -> tuple[Float[Tensor, "d_model d_model"], Float[Tensor, " d_model"]]:
    """The affine map that the neurons ``h = scale * (x up^T + up_bias) + shift`` add up to: weight and bias, float64.

    A plain FFN's neuron has the scale and the shift of its line. A gated one is linear in x when its activation is a
    constant, which is then the scale.
    """
    wide = down.double()
    constant = torch.zeros_like(scale) if shift is None else shift
    if up_bias is not None:
        constant = constant + scale * up_bias.double()
    return (wide * scale) @ up.double(), wide @ constant
