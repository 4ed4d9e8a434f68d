"""Heavy neurons beside one linear map that stands for all the others: the structure that a keep ratio pays for."""

from __future__ import annotations

from ffsplit.errors import BudgetError
from ffsplit.ffn.projections import DenseSpec, LowRankSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.methods.budgets import dense_branch_spec, heavy_count, keep_budget, sum_spec, to_nearest, width_for

MAP_SHARE = 0.1
"""Of the budget, for the map, when the budget decides."""


def heavy_and_map(shape: FFNShape, keep: float, heavy: float | None, *, bias: bool, align: int = 1) -> SumSpec:
    """Heavy neurons and a linear map, dense where the budget reaches, otherwise of the largest rank that fits.

    Args:
        shape: of the dense FFN.
        keep: share of its parameters that stay.
        heavy: share or number of heavy neurons; None gives the map a tenth of the budget and them the rest.
        bias: whether the sum has an output bias, which the dense FFN may lack.
        align: what the count of heavy neurons and the rank of the map are multiples of.

    Raises:
        BudgetError: nothing is left for the map or for a heavy neuron; the message says the smallest keep that works.
    """
    constant = shape.d_model * bias
    budget = keep_budget(shape, keep) - constant
    if heavy is None:
        count = _heavy_beside_map(shape, budget, constant, align)
    else:
        count = to_nearest(heavy_count(shape, heavy), align, shape.d_ff)
    left = budget - count * shape.neuron_parameters
    square = (shape.d_model, shape.d_model)
    fits = min(left // (2 * shape.d_model), shape.d_model)
    rank = fits if fits == shape.d_model else fits // align * align
    if rank < 1:
        smallest = (
            count * shape.neuron_parameters + constant + 2 * shape.d_model * min(align, shape.d_model)
        ) / shape.parameters
        raise BudgetError(
            f"keep={keep} leaves nothing for the linear map beside {count} heavy neurons; the smallest "
            f"reachable keep is {smallest:.4f} (or lower `heavy`)"
        )
    linear = DenseSpec(shape=square) if left >= shape.d_model**2 else LowRankSpec(shape=square, rank=rank)
    branches = sum_spec(shape, [dense_branch_spec(shape, count)], bias=bias)
    return branches.model_copy(update={"linear": linear})


def _heavy_beside_map(shape: FFNShape, budget: int, constant: int, align: int) -> int:
    """As many heavy neurons as fit beside a map that gets its share of the budget, and rank ``align`` at least."""
    least = 2 * shape.d_model * min(align, shape.d_model)
    # What `width_for` takes off for an output bias is off the budget already.
    free = budget + shape.d_model * shape.down_bias
    try:
        return width_for(shape, free - max(int(MAP_SHARE * (budget + constant)), least), align)
    except BudgetError:
        neuron = shape.neuron_parameters * min(align, shape.d_ff) + constant
        smallest = max(neuron / (1 - MAP_SHARE), neuron + least) / shape.parameters
        raise BudgetError(
            f"keep leaves no heavy neuron of d_ff={shape.d_ff} beside the linear map; the smallest reachable keep is "
            f"{smallest:.4f}"
        ) from None
