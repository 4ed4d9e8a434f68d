"""From a budget to a structure: how many neurons, which rank, which bits fit. Counting, no data."""

from __future__ import annotations

from collections.abc import Callable

from ffsplit.errors import BudgetError
from ffsplit.ffn.projections import (
    DenseSpec,
    LowRankSpec,
    OutlierColumnsSpec,
    OutlierWeightsSpec,
    PackedSpec,
    ProjectionSpec,
)
from ffsplit.ffn.projections.packed import ScaleBits
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import BranchSpec, SumSpec

FLOAT_BITS = 16


def dense_branch_spec(shape: FFNShape, neurons: int) -> BranchSpec:
    """A branch of ``neurons`` dense neurons."""
    inner = DenseSpec(shape=(neurons, shape.d_model))
    return BranchSpec(
        up=inner,
        gate=inner if shape.gated else None,
        down=DenseSpec(shape=(shape.d_model, neurons)),
        up_bias=shape.up_bias,
        gate_bias=shape.gate_bias,
    )


def low_rank_branch_spec(
    shape: FFNShape, neurons: int, rank: int, *, gate_rank: int | None = None, down_rank: int | None = None
) -> BranchSpec:
    """A branch of ``neurons`` neurons whose matrices have this rank; gate and `down` may have another one."""

    def inner(own: int | None) -> LowRankSpec:
        return LowRankSpec(shape=(neurons, shape.d_model), rank=rank if own is None else own)

    return BranchSpec(
        up=inner(None),
        gate=inner(gate_rank) if shape.gated else None,
        down=LowRankSpec(shape=(shape.d_model, neurons), rank=rank if down_rank is None else down_rank),
        up_bias=shape.up_bias,
        gate_bias=shape.gate_bias,
    )


def packed_branch_spec(
    shape: FFNShape,
    neurons: int,
    bits: int,
    group: int,
    symmetric: bool = False,
    scale_bits: ScaleBits = 16,
    *,
    input_scale: bool = False,
    outliers: float = 0,
    outlier_weights: float = 0,
) -> BranchSpec:
    """A branch of ``neurons`` neurons in ``bits``-bit codes; 16 bits means dense.

    With ``input_scale`` the columns of every matrix are scaled. Those of `down` need no stored factors where a factor
    on a row of `up` does the same. ``outliers`` is the share of each matrix's columns that stay in 16 bits,
    ``outlier_weights`` that of its single weights that have a number of 16 bits on top.
    """
    if bits == FLOAT_BITS:
        return dense_branch_spec(shape, neurons)

    def packed(rows: int, columns: int, scaled: bool) -> PackedSpec | OutlierColumnsSpec | OutlierWeightsSpec:
        whole = min(max(round(outliers * columns), 1), columns - 1) if outliers else 0
        codes = PackedSpec(
            shape=(rows, columns - whole),
            bits=bits,
            group=min(group, columns - whole),
            symmetric=symmetric,
            scale_bits=scale_bits,
            input_scale=scaled,
        )
        if outlier_weights:
            single = max(round(outlier_weights * rows * columns), 1)
            return OutlierWeightsSpec(shape=(rows, columns), packed=codes, outliers=single)
        return OutlierColumnsSpec(shape=(rows, columns), packed=codes) if whole else codes

    inner = packed(neurons, shape.d_model, input_scale)
    return BranchSpec(
        up=inner,
        gate=inner if shape.gated else None,
        down=packed(shape.d_model, neurons, input_scale and not shape.scales_through),
        up_bias=shape.up_bias,
        gate_bias=shape.gate_bias,
    )


def one_branch_spec(shape: FFNShape, storage: Callable[[tuple[int, int]], ProjectionSpec]) -> SumSpec:
    """One branch of all neurons, every matrix in the storage that is made of its shape ``(out, in)``."""
    inner = storage((shape.d_ff, shape.d_model))
    branch = BranchSpec(
        up=inner,
        gate=inner if shape.gated else None,
        down=storage((shape.d_model, shape.d_ff)),
        up_bias=shape.up_bias,
        gate_bias=shape.gate_bias,
    )
    return sum_spec(shape, [branch], bias=shape.down_bias)


def sum_spec(shape: FFNShape, branches: list[BranchSpec], *, bias: bool, linear_rank: int = 0) -> SumSpec:
    """A sum of the branches that have neurons; a linear map of rank 0 is none."""
    square = (shape.d_model, shape.d_model)
    return SumSpec(
        d_model=shape.d_model,
        branches=tuple(branch for branch in branches if branch.neurons),
        linear=LowRankSpec(shape=square, rank=linear_rank) if linear_rank else None,
        bias=bias,
    )


def keep_budget(shape: FFNShape, keep: float) -> int:
    """Parameters that a keep ratio allows."""
    return int(keep * shape.parameters)


def width_for(shape: FFNShape, parameters: int, align: int = 1, *, bias: bool = False) -> int:
    """The most neurons that fit into ``parameters``, a multiple of ``align`` (all of them if all fit).

    Args:
        shape: of the dense FFN.
        parameters: how many may be stored.
        align: what the width is a multiple of.
        bias: room for an output bias is needed even if the dense FFN has none.

    Raises:
        BudgetError: not even ``align`` neurons fit.
    """
    fixed = shape.d_model * (shape.down_bias or bias)
    fits = min((parameters - fixed) // shape.neuron_parameters, shape.d_ff)
    width = fits if fits == shape.d_ff else fits // align * align
    if width < 1:
        smallest = (min(align, shape.d_ff) * shape.neuron_parameters + fixed) / shape.parameters
        raise BudgetError(
            f"keep leaves no neuron of d_ff={shape.d_ff} (align={align}); the smallest reachable keep is {smallest:.4f}"
        )
    return width


def heavy_count(shape: FFNShape, heavy: float) -> int:
    """A share below 1 of the neurons, or a number of them.

    Raises:
        BudgetError: more heavy neurons than the FFN has.
    """
    count = round(heavy * shape.d_ff) if heavy < 1 else int(heavy)
    if count > shape.d_ff:
        raise BudgetError(f"heavy={heavy} is more than the FFN's d_ff={shape.d_ff} neurons")
    return count


def align_up(width: int, align: int, d_ff: int) -> int:
    """The next multiple of ``align``, or all ``d_ff`` neurons."""
    return min(-(-width // align) * align, d_ff)


def to_nearest(count: int, align: int, d_ff: int) -> int:
    """The nearest multiple of ``align`` that is not 0 unless ``count`` is, or all ``d_ff`` neurons."""
    return min(max(round(count / align), min(count, 1)) * align, d_ff)


def rank_for(shape: FFNShape, heavy: int, parameters: int, align: int = 1) -> int:
    """The largest common rank of the rest's matrices when ``heavy`` neurons stay dense.

    Args:
        shape: of the dense FFN.
        heavy: neurons that stay dense.
        parameters: how many may be stored.
        align: what the rank is a multiple of, unless it is the whole rank.

    Raises:
        BudgetError: not even rank ``align`` fits.
    """
    rest = shape.d_ff - heavy
    fixed = shape.d_model * shape.down_bias + rest * shape.neuron_biases + heavy * shape.neuron_parameters
    per_rank = shape.matrices * (rest + shape.d_model)
    whole = min(rest, shape.d_model)
    fits = min((parameters - fixed) // per_rank, whole)
    rank = fits if fits == whole else fits // align * align
    if rank < 1:
        smallest = (fixed + min(align, max(whole, 1)) * per_rank) / shape.parameters
        where = f"the rest beside {heavy} dense heavy neurons of" if heavy else "matrices of"
        hint = " (or lower `heavy`)" if heavy else ""
        raise BudgetError(
            f"keep leaves no rank for {where} d_ff={shape.d_ff}; the smallest reachable keep is {smallest:.4f}{hint}"
        )
    return rank


def heavy_beside_rank(shape: FFNShape, heavy: int, rank: int, parameters: int, align: int) -> int:
    """Heavy neurons once what the rounded rank left is spent on more of them, ``align`` at a time.

    Args:
        shape: of the dense FFN.
        heavy: neurons that stay dense anyway, which fit.
        rank: of the matrices of all others.
        parameters: how many may be stored.
        align: how many neurons are added at a time.
    """
    used = sum_spec(
        shape,
        [dense_branch_spec(shape, heavy), low_rank_branch_spec(shape, shape.d_ff - heavy, rank)],
        bias=shape.down_bias,
    ).parameters
    # A neuron that becomes heavy takes its row out of the low-rank factors.
    cost = shape.matrices * max(shape.d_model - rank, 1)
    more = min((parameters - used) // cost, shape.d_ff - heavy - rank)
    return heavy + max(more // align, 0) * align


def average_bits(spec: SumSpec, shape: FFNShape) -> float:
    """Stored bits per dense FFN weight, everything counted, floating-point numbers at 16 bits."""
    return spec.stored_bits(FLOAT_BITS) / shape.weights
