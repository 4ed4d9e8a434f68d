"""MoEfication: neurons in experts of equal size, a router fitted in closed form (arXiv 2110.01786)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.selectors import Router, RouterSpec, Selector, SelectorSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods.registry import method
from ffsplit.methods.sparsity import HeavyConfig, fit_masked, left_over, masked_structure
from ffsplit.ops.clustering import balanced_kmeans, cluster_sizes
from ffsplit.ops.least_squares import affine_fit
from ffsplit.ops.scores import column_norm


class MoeficationConfig(HeavyConfig):
    """How many experts there are and how many of them rest.

    Attributes:
        sparsity: share of the neurons that stay out for every token (rounded up to whole experts). It is saved of all
            the FFN's products, less those of the router.
        expert_size: neurons of an expert; where they do not divide evenly some experts have more.
        router_ridge: pull of the router's weights to zero, relative to the mean diagonal of the inputs' Gram.
    """

    method: Literal["moefication"] = "moefication"
    expert_size: int = Field(32, ge=1)
    router_ridge: float = Field(1e-3, ge=0)


def structure(shape: FFNShape, config: MoeficationConfig) -> SumSpec:
    """Experts under a router, beside the heavy neurons if there are any.

    Raises:
        BudgetError: not one expert would work.
    """

    def router(neurons: int, share: float) -> RouterSpec:
        experts = max(neurons // config.expert_size, 1)
        active = left_over(experts, share, "experts")
        return RouterSpec(neurons=neurons, d_model=shape.d_model, experts=experts, active=active)

    return masked_structure(shape, config.sparsity, config.heavy, router)


@method(
    "moefication",
    summary="neurons in experts of equal size, of which a linear router picks some for every token",
    paper="MoEfication, arXiv 2110.01786",
    budget=("sparsity",),
    as_sum="(heavy: dense, always) + experts: dense, under a router",
    config=MoeficationConfig,
    structure=structure,
)
def moefication(data: LayerData, config: MoeficationConfig) -> SumFFN:
    """Cluster the neurons by what triggers them, then predict the size of each cluster's output."""
    spec = structure(FFNShape.of(data.ffn), config)

    def calibrate(rest: FFNWeights, wanted: SelectorSpec) -> Selector:
        assert isinstance(wanted, RouterSpec)
        weight, bias = fit_router(data, rest, wanted, config.router_ridge)
        return Router(wanted, weight.to(rest.up), bias.to(rest.up))

    router = spec.branches[-1].selector
    assert isinstance(router, RouterSpec)
    return fit_masked(data, config, spec, calibrate, lambda rest: expert_order(rest, router.experts, data.seed))


def expert_order(ffn: FFNWeights, experts: int, seed: int) -> Int64[Tensor, " neurons"]:
    """The neurons expert by expert. Like neurons are those whose gate (or `up`) points the same way."""
    rows = normalize(ffn.up if ffn.gate is None else ffn.gate, dim=1)
    labels = balanced_kmeans(rows, experts, torch.Generator().manual_seed(seed))
    return labels.argsort(stable=True)


def fit_router(
    data: LayerData, ffn: FFNWeights, spec: RouterSpec, ridge: float
) -> tuple[Float[Tensor, "experts d_model"], Float[Tensor, " experts"]]:
    """Least squares from the inputs to the root of each expert's energy, the sum of its ``(h_j ||down_j||)^2``."""
    sizes, lengths = cluster_sizes(spec.neurons, spec.experts), column_norm(ffn.down)
    cross = torch.zeros(spec.d_model, spec.experts, dtype=torch.float64, device=ffn.up.device)
    total = cross.new_zeros(spec.experts)
    for x in data.chunks():
        parts = torch.split(ffn.hidden(x) * lengths, sizes, dim=1)
        target = torch.stack([part.norm(dim=1) for part in parts], dim=1).double()
        cross.addmm_(x.double().T, target)
        total += target.sum(0)
    sums = data.moments
    return affine_fit(sums.input_gram, cross, sums.input_sum, total, int(sums.tokens), ridge)
