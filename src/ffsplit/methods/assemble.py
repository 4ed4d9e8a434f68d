"""Fitting a sum of branches: compress the inner projections, then `down` branch by branch, cheapest first.

`down` is linear in the hidden activations, so it can be fitted exactly from sums. The parts with the fewest resources
are compressed first, each against what the parts still undecided cannot make up for (the Schur complement of their
Gram); afterwards the undecided parts, refitted by least squares, absorb the error that was made. The heavy hitters come
last, so the branch that keeps its precision repairs the damage of the one that does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ffsplit.calibrate.layer import LayerData, RefitSums
from ffsplit.ffn.projections import Dense, DenseSpec, Packed, Projection, StorageSpec
from ffsplit.ffn.selectors import Selector
from ffsplit.ffn.spec import BranchSpec, SumSpec
from ffsplit.ffn.sum import Branch, SumFFN
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods.compressors import SVD, WHITENED, Compressor
from ffsplit.ops.affine_activation import AffineActivation
from ffsplit.ops.least_squares import refit_down
from ffsplit.ops.linalg import diagonal_scale, schur_complement

Compress = Callable[[Float[Tensor, "d_model part"], Float[Tensor, "part part"]], Projection]


@dataclass(frozen=True)
class Part:
    """A branch to be (dense projections need no algorithm).

    Attributes:
        neurons: which of the FFN's.
        spec: its structure.
        how: the algorithm for its projections.
        how_down: the algorithm for `down` where it is another one; None means ``how``.
        selector: of the branch, calibrated beforehand, if its structure has one.
        line: what stands for the activation in a branch without one.
    """

    neurons: Int[Tensor, " neurons"]
    spec: BranchSpec
    how: Compressor = SVD
    how_down: Compressor | None = None
    selector: Selector | None = None
    line: AffineActivation | None = None

    @property
    def for_down(self) -> Compressor:
        return self.how if self.how_down is None else self.how_down


@dataclass(frozen=True)
class AffineStart:
    """Where the linear map and the bias of a sum start from: the ridge of a refit pulls to it.

    Attributes:
        bias: beside the dense FFN's own; None means zero.
        weight: of the map; None means zero.
    """

    bias: Float[Tensor, " d_model"] | None = None
    weight: Float[Tensor, "d_model d_model"] | None = None


ZERO = AffineStart()


@dataclass(frozen=True)
class Segment:
    """Columns of the joint `down` that are decided together, and how."""

    columns: slice
    compress: Compress


def fit_parts(
    data: LayerData,
    parts: Sequence[Part],
    spec: SumSpec,
    *,
    refit: bool,
    ridge: float,
    linear: Compressor = WHITENED,
    start: AffineStart = ZERO,
) -> SumFFN:
    """A sum of branches fitted to one FFN.

    Args:
        data: the dense FFN and its calibration inputs.
        parts: heavy first; neurons that no part names are dropped.
        spec: the structure promised by the method's plan; a linear map in it needs ``refit`` or ``start``.
        refit: fit `down` by least squares to the dense outputs on the inputs that the compressed inner projections
            really produce; otherwise every projection approximates its own dense matrix.
        ridge: pull of the refit towards the old weights, relative to the mean diagonal of the Gram.
        linear: the algorithm for a linear map beside the branches, if the structure has one.
        start: the linear map and the bias to start from.

    Returns:
        a sum whose structure is ``spec``.
    """
    drafts = [_draft(data, part) for part in parts]
    if refit:
        downs, mapped, bias = _refit_downs(data, parts, drafts, spec, ridge, linear, start)
    else:
        downs = _plain_downs(data, parts)
        mapped, bias = _plain_map(data, spec, linear, start)
    for draft, down in zip(drafts, downs, strict=True):
        draft.down = down
    return SumFFN(data.ffn.d_model, drafts, mapped, bias)


def _draft(data: LayerData, part: Part) -> Branch:
    """The branch with its inner projections compressed; `down` is an exact stand-in until it is fitted."""
    ffn, spec, dtype = data.ffn.take(part.neurons), part.spec, data.ffn.up.dtype
    act: nn.Module | None = ffn.act
    if spec.act == "none":
        assert part.line is not None, "a branch without an activation needs a line in its place"
        act, ffn = None, _without_activation(ffn, part.line)
    inner_is_dense = isinstance(spec.up, DenseSpec)
    gram = data.moments.input_gram if part.how.needs_gram and not inner_is_dense else None
    inner: list[Projection]
    if ffn.gate is None or spec.gate is None:
        inner = [part.how(ffn.up, spec.up, gram, dtype)]
    elif spec.gate == spec.up:
        inner = part.how.together([ffn.up, ffn.gate], spec.up, gram, dtype)
    else:
        inner = [part.how(ffn.up, spec.up, gram, dtype), part.how(ffn.gate, spec.gate, gram, dtype)]
    gate = inner[1] if inner[1:] else None
    return Branch(act, inner[0], Dense(ffn.down), gate, ffn.up_bias, ffn.gate_bias, part.selector)


def _without_activation(ffn: FFNWeights, line: AffineActivation) -> FFNWeights:
    """The line in place of the activation, in the weights of the projection before it."""
    if ffn.gate is None:
        up, up_bias = line.folded(ffn.up, ffn.up_bias)
        return replace(ffn, up=up, up_bias=up_bias)
    gate, gate_bias = line.folded(ffn.gate, ffn.gate_bias)
    return replace(ffn, gate=gate, gate_bias=gate_bias)


def _plain_downs(data: LayerData, parts: Sequence[Part]) -> list[Projection]:
    downs = []
    for part in parts:
        gram = None
        if not isinstance(part.spec.down, DenseSpec) and part.for_down.needs_gram:
            gram = data.statistics.hidden_gram[part.neurons][:, part.neurons]
        weight = data.ffn.down[:, part.neurons]
        downs.append(part.for_down(weight, part.spec.down, gram, data.ffn.up.dtype))
    return downs


def _plain_map(
    data: LayerData, spec: SumSpec, how: Compressor, start: AffineStart
) -> tuple[Projection | None, Tensor | None]:
    """The linear map and the bias as they start, the map compressed for the inputs."""
    bias = _shifted(data.ffn, start.bias)
    if spec.linear is None:
        return None, bias
    assert start.weight is not None, "a linear map needs a refit or a start"
    gram = data.moments.input_gram if how.needs_gram and not isinstance(spec.linear, DenseSpec) else None
    return how(start.weight, spec.linear, gram, data.ffn.up.dtype), bias


def _refit_downs(
    data: LayerData,
    parts: Sequence[Part],
    drafts: Sequence[Branch],
    spec: SumSpec,
    ridge: float,
    how_linear: Compressor,
    start: AffineStart,
) -> tuple[list[Projection], Projection | None, Tensor | None]:
    ffn, dtype = data.ffn, data.ffn.up.dtype
    segments: list[Segment] = []
    priors: list[Tensor] = []

    def add(prior: Tensor, structure: StorageSpec, how: Compressor) -> None:
        first = segments[-1].columns.stop if segments else 0
        columns = slice(first, first + prior.shape[1])
        segments.append(Segment(columns, lambda weight, gram: how(weight, structure, gram, dtype)))
        priors.append(prior)

    if spec.bias:
        shift = ffn.down.new_zeros(ffn.d_model) if start.bias is None else start.bias
        add(shift[:, None], DenseSpec(shape=(ffn.d_model, 1)), SVD)
    for part in parts:
        add(ffn.down[:, part.neurons], part.spec.down, part.for_down)
    if spec.linear is not None:
        square = ffn.down.new_zeros(ffn.d_model, ffn.d_model) if start.weight is None else start.weight
        add(square, spec.linear, how_linear)

    sums = _joint_sums(data, parts, drafts, bias=spec.bias, linear=spec.linear is not None)
    fitted = fit_segments(sums, segments, torch.cat(priors, dim=1), ridge)
    bias = None
    if spec.bias:
        bias = _shifted(ffn, fitted.pop(0).dense()[:, 0])
    linear = fitted.pop() if spec.linear is not None else None
    return fitted, linear, bias


def _shifted(ffn: FFNWeights, shift: Float[Tensor, " d_model"] | None) -> Float[Tensor, " d_model"] | None:
    """The output bias with something added to it; None if there is neither."""
    if shift is None:
        return ffn.down_bias
    return (shift if ffn.down_bias is None else ffn.down_bias + shift).to(ffn.up.dtype)


def _joint_sums(
    data: LayerData, parts: Sequence[Part], drafts: Sequence[Branch], *, bias: bool, linear: bool
) -> RefitSums:
    """Sums over [1 | hidden of every part | x], whichever of them exist."""
    exact = all(
        isinstance(part.spec.up, DenseSpec) and part.selector is None and part.spec.act == "model" for part in parts
    )
    if exact and not bias and not linear and data.corrections is None:
        return _sums_from_statistics(data.ffn, data.statistics.hidden_gram, torch.cat([p.neurons for p in parts]))

    decoded = [_decoded(draft, data.ffn.up.dtype) for draft in drafts]

    @torch.no_grad()
    def hidden(x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens hidden"]:
        columns = [x.new_ones(x.shape[0], 1)] if bias else []
        columns += [draft.hidden(x) for draft in decoded]
        return torch.cat([*columns, x] if linear else columns, dim=1)

    return data.refit_sums(hidden)


def _decoded(draft: Branch, dtype: torch.dtype) -> Branch:
    """The branch with packed inner projections written out, so that codes are decoded once and not for every chunk."""
    if not isinstance(draft.up, Packed):
        return draft
    gate = None if draft.gate is None else Dense(draft.gate.dense(dtype))
    act = draft.act if draft.activated else None
    return Branch(act, Dense(draft.up.dense(dtype)), draft.down, gate, draft.up_bias, draft.gate_bias, draft.selector)


def _sums_from_statistics(
    ffn: FFNWeights, hidden_gram: Float[Tensor, "d_ff d_ff"], kept: Int[Tensor, " kept"]
) -> RefitSums:
    """Exact inner projections: the sums are already in the dense FFN's Gram, no second pass needed."""
    down = ffn.down.to(hidden_gram.dtype)
    rows = hidden_gram[kept]
    energy = torch.einsum("oi,ij,oj->", down, hidden_gram, down)
    return RefitSums(rows[:, kept], rows @ down.T, energy)


def fit_segments(
    sums: RefitSums, segments: Sequence[Segment], prior: Float[Tensor, "d_model hidden"], ridge: float
) -> list[Projection]:
    """Compress the columns of a joint `down` segment by segment, the last first, the others absorbing the error.

    Each segment is measured in its own unit (its mean Gram diagonal), so that one relative ridge suits hidden
    activations, inputs and constants alike.

    Args:
        sums: Gram of the hidden activations and their products with the targets.
        segments: contiguous, in column order; the first ones have the most resources.
        prior: where the ridge pulls to.
        ridge: relative to the mean diagonal of the Gram.

    Returns:
        one projection a segment, in the order given.
    """
    unit = _units(sums.gram, segments)
    gram = sums.gram / unit[:, None] / unit
    cross = sums.cross / unit[:, None]
    start = prior.double() * unit
    done: list[Projection] = []
    for segment in reversed(segments):
        mine, rest = segment.columns, slice(0, segment.columns.start)
        undecided = slice(0, mine.stop)
        weight = refit_down(gram[undecided, undecided], cross[undecided], ridge, start[:, undecided])[:, mine]
        effective = schur_complement(gram, rest, mine, ridge) if mine.start else gram[mine, mine]
        scale = unit[mine]
        projection = segment.compress(weight / scale, symmetric(effective * scale[:, None] * scale))
        decided = projection.dense(torch.float64) * scale
        cross[rest] -= gram[rest, mine] @ decided.T
        done.append(projection)
    return done[::-1]


def _units(gram: Float[Tensor, "hidden hidden"], segments: Sequence[Segment]) -> Float[Tensor, " hidden"]:
    unit = torch.ones(gram.shape[0], dtype=torch.float64, device=gram.device)
    for segment in segments:
        unit[segment.columns] = diagonal_scale(gram[segment.columns, segment.columns]).sqrt()
    return unit


def symmetric(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The symmetric part: rounding leaves a Schur complement slightly skew."""
    return (matrix + matrix.T) / 2
