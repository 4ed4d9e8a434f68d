"""Which neurons to keep when the others are to be replaced by a least-squares refit of ``down``.

Unlike the scores of `scores`, these look at the whole hidden Gram ``C = sum h^T h``: a neuron that others can imitate
is worth little however large it is. The error meant throughout is ``min_W ||h down^T - h_S W^T||_F^2`` over the kept
set S.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ffsplit.errors import RecipeError
from ffsplit.ops.elimination import FLUSH, Elimination, eliminate
from ffsplit.ops.linalg import diagonal_scale, inverse_psd, ridged

REDUNDANT = 1e-9  # a neuron with less than this share of its energy unexplained by those picked has nothing to add
SMALLEST_RIDGE = 1e-9  # pruning needs an inverse of the Gram, and a dead neuron must cost nothing, not be undefined


def leverage(hidden_gram: Float[Tensor, "d_ff d_ff"], ridge: float) -> Float[Tensor, " d_ff"]:
    """Ridge leverage scores ``diag(C (C + lam I)^-1)``, in [0, 1]; ``lam = ridge * mean(diag(C))``.

    Reference: MoDeGPT, arXiv 2408.09632, the Nystrom selection for MLPs.
    """
    shift = max(ridge, SMALLEST_RIDGE)
    inverse = inverse_psd(hidden_gram, shift).diagonal()
    return (1.0 - shift * diagonal_scale(hidden_gram) * inverse).clamp(0.0, 1.0)


def pivoted_qr_order(
    hidden_gram: Float[Tensor, "d_ff d_ff"], count: int | None = None, tol: float | None = None
) -> Int[Tensor, " kept"]:
    """Neurons in the pivot order of a column-pivoted QR of the activations, from their Gram alone.

    Args:
        hidden_gram: ``h^T h``.
        count: how many neurons at most; all if None.
        tol: stop when the norm of what the picked neurons leave of any neuron is at most this fraction of the largest
            neuron's norm.

    Reference: STAT, arXiv 2406.00061 (interpolative decomposition).
    """
    size = hidden_gram.shape[0]
    wanted = _checked("count", size if count is None else count, size)
    state = Elimination(hidden_gram, hidden_gram.new_zeros(size, 0))
    orders, pivots = [state.picked.new_empty(0, dtype=torch.int64)], [state.diagonal[:0]]
    limit = 0.0 if tol is None else tol**2 * state.diagonal.max() if size else 0.0
    for start in range(0, wanted, FLUSH):
        order, pivot = eliminate(state, min(FLUSH, wanted - start), lambda now: now.diagonal)
        orders.append(order)
        pivots.append(pivot)
        if tol is not None and bool(pivot[-1] <= limit):
            break
    order = torch.cat(orders)
    return order if tol is None else order[torch.cat(pivots) > limit]


def forward_selection_order(
    hidden_gram: Float[Tensor, "d_ff d_ff"],
    down: Float[Tensor, "d_model d_ff"],
    count: int,
    *,
    ridge: float = 0.0,
    block: int = 1,
) -> Int[Tensor, " count"]:
    """Greedy forward selection: always add the neuron that reduces the refitted output error the most.

    Args:
        hidden_gram: ``h^T h``.
        down: the weight whose output is to be kept.
        count: how many neurons to select.
        ridge: relative to the mean diagonal; that of the refit to come.
        block: neurons added per evaluation of the gains.

    Returns:
        Indices in the order of selection; every prefix is a selection too. Costs O(count d_ff (FLUSH + d_model)).
    """
    _checked("count", count, hidden_gram.shape[0])
    gram = ridged(hidden_gram, ridge)
    # The row norms are tracked to a relative eps of where they start: below this, a gain would be rounding noise.
    state = Elimination(gram, gram @ down.double().T, floor=REDUNDANT * gram.diagonal())
    return eliminate(state, count, Elimination.gain, block)[0]


def obs_ranking(
    hidden_gram: Float[Tensor, "d_ff d_ff"],
    down: Float[Tensor, "d_model d_ff"],
    keep: int,
    *,
    ridge: float = 1e-6,
    block: int = 1,
) -> Int[Tensor, " d_ff"]:
    """All neurons, most important first, by greedy backward elimination down to ``keep`` neurons.

    Always prunes the neuron j with the least ``||V_j||^2 / [C^-1]_jj``, where V is the ``down`` refitted so far. The
    first ``k`` neurons of the result are the greedy set of size k for every ``k >= keep``: the first ``keep`` are
    sorted by what pruning them would cost next, the others stand in reverse order of removal.

    Args:
        hidden_gram: ``h^T h``.
        down: the weight whose output is to be kept.
        keep: where the elimination stops.
        ridge: relative to the mean diagonal; at least 1e-9.
        block: neurons pruned per evaluation of the costs; more is faster and greedier.

    Reference: SlimGPT, arXiv 2412.18110; ZipLM, arXiv 2302.04089, algorithm 1.
    """
    size = hidden_gram.shape[0]
    _checked("keep", keep, size)
    inverse = inverse_psd(hidden_gram, max(ridge, SMALLEST_RIDGE))
    # Every pivot is at least one over a diagonal entry of the Gram, so none is ever zero.
    state = Elimination(inverse, down.double().T, floor=inverse.new_zeros(()))
    removed, _ = eliminate(state, size - keep, lambda now: -now.gain(), block)
    left = state.gain().masked_fill(state.picked, -torch.inf)
    return torch.cat([left.topk(keep).indices, removed.flip(0)])


def greedy_obs_order(
    hidden_gram: Float[Tensor, "d_ff d_ff"],
    down: Float[Tensor, "d_model d_ff"],
    keep: int,
    *,
    ridge: float = 1e-6,
    block: int = 1,
) -> Int[Tensor, " keep"]:
    """The ``keep`` neurons that survive greedy backward elimination, most important first; see `obs_ranking`."""
    return obs_ranking(hidden_gram, down, keep, ridge=ridge, block=block)[:keep]


def _checked(name: str, value: int, limit: int) -> int:
    if not 0 <= value <= limit:
        raise RecipeError(f"{name}={value} is not in 0..{limit}, the number of neurons")
    return value
