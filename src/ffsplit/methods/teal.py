"""TEAL: thresholds on the inputs of every projection (arXiv 2408.14690)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import linear

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.selectors import InputThreshold, InputThresholdSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN, dense_branch
from ffsplit.methods.assemble import Part, fit_parts
from ffsplit.methods.budgets import dense_branch_spec, sum_spec
from ffsplit.methods.registry import method
from ffsplit.methods.sparsity import RefitConfig, histogram, late_tokens, quantile
from ffsplit.ops.thresholds import greedy_shares


class TealConfig(RefitConfig):
    """How many inputs are left out, and how that is shared between the projections.

    Attributes:
        sparsity: share of the weights that an average token does not need: an input below its projection's threshold
            takes its column of the weight with it. It is the share of such inputs over the calibration tokens,
            averaged over `up`, `gate` and `down`, and is saved of the FFN's products too.
        allocation: ``greedy`` shares it by the measured error of the output, ``uniform`` gives each projection the
            same.
        step: rise of the average sparsity in one step of the greedy allocation.
        search_tokens: how many tokens, spread over the text, the error is measured on; only the last quarter of each
            sequence is looked at, because first tokens may have activations that outvote all others.
    """

    method: Literal["teal"] = "teal"
    allocation: Literal["greedy", "uniform"] = "greedy"
    step: float = Field(0.05, gt=0, le=1)
    search_tokens: int = Field(2048, ge=1)


def structure(shape: FFNShape, config: TealConfig) -> SumSpec:
    """All neurons, with a threshold on the inputs of each projection."""
    selector = InputThresholdSpec(gated=shape.gated, sparsity=config.sparsity)
    branch = dense_branch_spec(shape, shape.d_ff).model_copy(update={"selector": selector})
    return sum_spec(shape, [branch], bias=shape.down_bias)


@method(
    "teal",
    summary="leave out small inputs of every projection, a threshold each, shared out greedily",
    paper="TEAL, arXiv 2408.14690",
    budget=("sparsity",),
    as_sum="one dense branch, thresholds on its inputs",
    config=TealConfig,
    structure=structure,
)
def teal(data: LayerData, config: TealConfig) -> SumFFN:
    """First how sparse each projection is, then the thresholds that make it so."""
    spec = structure(FFNShape.of(data.ffn), config)
    branch = spec.branches[0]
    assert isinstance(branch.selector, InputThresholdSpec)
    if config.allocation == "greedy":
        shares = allocate(data, branch.selector, config)
    else:
        shares = [config.sparsity] * branch.selector.parameters
    selector = thresholds(data, branch.selector, shares)
    part = Part(torch.arange(data.ffn.d_ff, device=data.ffn.up.device), branch, selector=selector)
    return fit_parts(data, [part], spec, refit=config.refit, ridge=config.ridge)


def allocate(data: LayerData, spec: InputThresholdSpec, config: TealConfig) -> list[float]:
    """Sparsities of `up`, `down` and `gate` by the error that they make on a sample of tokens."""
    ffn = data.ffn
    inputs = histogram(data, (x.abs() for x in data.chunks()))
    hidden = histogram(data, (ffn.hidden(x).abs() for x in data.chunks()))
    x, branch = late_tokens(data, config.search_tokens), dense_branch(ffn)
    wanted = linear(ffn.hidden(x), ffn.down)

    @cache
    def level(share: float, of_hidden: bool) -> float:
        return (hidden if of_hidden else inputs).quantile(share) if share else 0.0

    def error(shares: Sequence[float]) -> float:
        levels = [level(share, index == 1) for index, share in enumerate(shares)]
        branch.selector = InputThreshold(spec, torch.tensor(levels).to(ffn.up))
        return float((branch(x) - wanted).double().square().sum())

    return greedy_shares(error, [ffn.up.numel()] * spec.parameters, config.sparsity, config.step)


def thresholds(data: LayerData, spec: InputThresholdSpec, shares: Sequence[float]) -> InputThreshold:
    """The thresholds of `up`, `down` and `gate`; that of `down` on the hidden activations of the masked inputs."""
    ffn, branch = data.ffn, dense_branch(data.ffn)

    def of_inputs(share: float) -> float:
        return quantile(data, torch.abs, share) if share else 0.0

    up, gate = of_inputs(shares[0]), [of_inputs(share) for share in shares[2:]]
    branch.selector = InputThreshold(spec, torch.tensor([up, 0.0, *gate]).to(ffn.up))

    def hidden(x: Tensor) -> Tensor:
        return branch.hidden(x).abs()

    down = quantile(data, hidden, shares[1]) if shares[1] else 0.0
    return InputThreshold(spec, torch.tensor([up, down, *gate]).to(ffn.up))
