"""What methods share that leave out neurons at run time: heavy neurons that always work, a rest under a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor
from torch.nn.functional import linear

from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import BudgetError, DataError
from ffsplit.ffn.selectors import Selector, SelectorSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods.assemble import Part, fit_parts
from ffsplit.methods.budgets import dense_branch_spec, heavy_count, sum_spec
from ffsplit.methods.neurons import neuron_scores
from ffsplit.methods.registry import SparsityConfig
from ffsplit.ops import quantiles
from ffsplit.ops.quantiles import Histogram

# A share that should come out as exactly one may be above it by rounding.
ROUNDING = 1e-9


class RefitConfig(SparsityConfig):
    """Settings of every method that leaves out work and can let `down` make up for it.

    Attributes:
        refit: least-squares fit of `down` on the hidden activations that are left (ours; the papers have none).
        ridge: pull of that fit to the old weights.
    """

    refit: bool = False
    ridge: float = Field(1e-2, ge=0)


class HeavyConfig(RefitConfig):
    """Settings of every method that leaves out neurons beside some that always work.

    Attributes:
        heavy: share of the neurons, those of the largest output norm, that work for every token (ours: FFSplit made
            dynamic); more is left out of the others, so that the FFN as a whole reaches `sparsity`.
    """

    heavy: float = Field(0.0, ge=0, lt=1)


Structure = Callable[[int, float], SelectorSpec]
"""The selector of a branch of so many neurons, of whose work this share is left out."""
Calibrate = Callable[[FFNWeights, SelectorSpec], Selector]
"""The selector of a structure for the neurons of a branch."""
Arrange = Callable[[FFNWeights], Int64[Tensor, " neurons"]]
"""The order of the neurons of a branch that its selector wants."""


def split(shape: FFNShape, sparsity: float, heavy: float) -> tuple[int, float]:
    """How many neurons always work, and which share is to be left out of the others to reach ``sparsity`` over all.

    Raises:
        BudgetError: leaving out all the others is not enough.
    """
    always = heavy_count(shape, heavy)
    rest = shape.d_ff - always
    if rest * (1 + ROUNDING) < sparsity * shape.d_ff:
        raise BudgetError(
            f"sparsity={sparsity} is out of reach with {always} of d_ff={shape.d_ff} neurons that always work; the "
            f"largest reachable is {rest / shape.d_ff:.4f} (or let fewer neurons always work)"
        )
    return always, min(sparsity * shape.d_ff / rest, 1.0)


def masked_structure(shape: FFNShape, sparsity: float, heavy: float, selector: Structure) -> SumSpec:
    """A dense branch of the heavy neurons, if there are any, and one of the rest under a selector."""
    always, share = split(shape, sparsity, heavy)
    rest = dense_branch_spec(shape, shape.d_ff - always)
    masked = rest.model_copy(update={"selector": selector(rest.neurons, share)})
    return sum_spec(shape, [dense_branch_spec(shape, always), masked], bias=shape.down_bias)


def fit_masked(
    data: LayerData,
    config: RefitConfig,
    spec: SumSpec,
    calibrate: Calibrate,
    arrange: Arrange | None = None,
    score: Float[Tensor, " d_ff"] | None = None,
) -> SumFFN:
    """Neurons that always work, a calibrated selector for the rest, `down` as it was or refitted.

    Args:
        data: the dense FFN and its inputs.
        config: says whether `down` is refitted.
        spec: what :func:`masked_structure` promised.
        calibrate: finds the numbers of the selector.
        arrange: the order of the rest's neurons; None leaves them in that of the FFN.
        score: the neurons of the highest always work; None means their output norm.
    """
    always = spec.branches[0].neurons if len(spec.branches) > 1 else 0
    order = torch.arange(data.ffn.d_ff, device=data.ffn.up.device)
    if always:
        scores = neuron_scores(data, "output_norm") if score is None else score
        order = scores.argsort(descending=True, stable=True)
    parts = [Part(order[:always], spec.branches[0])] if always else []
    # The rest in its own order: only which neurons are heavy matters.
    rest, branch = order[always:].sort().values, spec.branches[-1]
    if arrange is not None:
        rest = rest[arrange(data.ffn.take(rest))]
    assert branch.selector is not None
    parts.append(Part(rest, branch, selector=calibrate(data.ffn.take(rest), branch.selector)))
    return fit_parts(data, parts, spec, refit=config.refit, ridge=config.ridge)


def mean_square_up(data: LayerData, ffn: FFNWeights) -> Float[Tensor, " neurons"]:
    """``E[up_j^2]`` over the calibration tokens, float64; one without a gate, where nothing is multiplied."""
    total = torch.zeros(ffn.d_ff, dtype=torch.float64, device=ffn.up.device)
    if not ffn.gated:
        return total + 1
    for x in data.chunks():
        total += linear(x, ffn.up, ffn.up_bias).double().square().sum(0)
    return total / data.inputs.tokens


def left_over(count: int, sparsity: float, what: str) -> int:
    """How many of ``count`` work when at least the share ``sparsity`` does not.

    Raises:
        BudgetError: none would work.
    """
    working = int((1 - sparsity) * count * (1 + ROUNDING))
    if working < 1:
        raise BudgetError(
            f"sparsity={sparsity} leaves none of {count} {what}; the largest reachable is {1 - 1 / count:.4f}"
        )
    return working


def late_tokens(data: LayerData, count: int) -> Float[Tensor, "sample d_model"]:
    """At most ``count`` calibration inputs, evenly spread over the last quarter of every sequence."""
    every = max(-(-(data.inputs.tokens // 4 + len(data.inputs)) // count), 1)
    rows, seen = [], 0
    for x in data.chunks():
        late = x[3 * len(x) // 4 :]
        rows.append(late[-seen % every :: every])
        seen += len(late)
    return torch.cat(rows)


def quantile(data: LayerData, values: Callable[[Float[Tensor, "tokens d_model"]], Tensor], share: float) -> float:
    """A quantile of values that are computed chunk by chunk from the calibration inputs.

    Raises:
        DataError: some of them are NaN or Inf.
    """

    def chunks() -> Iterator[Tensor]:
        return (values(x) for x in data.chunks())

    return quantiles.quantile(chunks, share, histogram(data, chunks()))


def histogram(data: LayerData, values: Iterable[Tensor]) -> Histogram:
    """The distribution of values that are computed chunk by chunk.

    Raises:
        DataError: some of them are NaN or Inf.
    """
    counted = Histogram.zeros(data.ffn.up.device)
    for chunk in values:
        counted.add(chunk)
    if not counted.finite:
        raise DataError(
            f"{data.name}: some activations are NaN or Inf: the model overflows on this text in this dtype; calibrate "
            "in float32 or bfloat16"
        )
    return counted
