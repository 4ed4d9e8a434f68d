"""SparseGPT: zero weights one input column at a time and let the columns that are still free absorb the error.

GPTQ's sweep with another decision: a weight becomes zero or stays. Which weights do is chosen a block (or a group of an
N:M pattern) at a time, on the weights as they have been corrected by then.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ffsplit.ops.blocks import settle_block
from ffsplit.ops.gptq import inverse_factor, settle_span
from ffsplit.ops.sparsity import best_mask, n_m_mask

Choose = Callable[[int, Float[Tensor, "out ahead"]], Bool[Tensor, "out ahead"]]


def sparsegpt(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], kept: int, *, damp: float = 0.01, block: int = 128
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """A matrix with ``kept`` weights whose outputs are close to those of ``weight``.

    Args:
        weight: any float dtype; worked on in float32, or float64 if it is.
        gram: ``sum x^T x`` of the inputs; dead inputs and singular Grams are fine.
        kept: how many weights survive. Every block of columns keeps its share of them, in whichever rows.
        damp: ridge on the Gram, relative to its mean diagonal.
        block: columns that are chosen from together.

    Returns:
        The corrected weights, zero where pruned, and the mask.

    Reference: SparseGPT, arXiv 2301.00774, algorithm 1 with adaptive mask selection.
    """
    columns = weight.shape[1]

    def choose(first: int, score: Float[Tensor, "out ahead"]) -> Bool[Tensor, "out ahead"]:
        stop = first + score.shape[1]
        return best_mask(score, kept * stop // columns - kept * first // columns)

    return _sweep(weight, gram, choose, damp, chosen_from=block, block=block)


def sparsegpt_n_m(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    n: int,
    m: int,
    *,
    damp: float = 0.01,
    block: int = 128,
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """`sparsegpt` with ``n`` survivors in every ``m`` neighbours along the inputs.

    Reference: SparseGPT, arXiv 2301.00774, section 3.3 on semi-structured patterns.
    """

    def choose(first: int, score: Float[Tensor, "out ahead"]) -> Bool[Tensor, "out ahead"]:
        return n_m_mask(score, n, m)

    return _sweep(weight, gram, choose, damp, chosen_from=m, block=-(-block // m) * m)


def _sweep(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    choose: Choose,
    damp: float,
    *,
    chosen_from: int,
    block: int,
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """Decide all columns; ``choose`` is asked every ``chosen_from`` of them, which divides ``block``."""
    rest = weight.to(torch.promote_types(weight.dtype, torch.float32)).T.clone()
    factor = inverse_factor(gram, damp).to(rest)
    mask = torch.zeros(rest.shape, dtype=torch.bool, device=rest.device)

    def settle(column: int, ahead: Float[Tensor, "ahead out"]) -> Float[Tensor, " out"]:
        if column % chosen_from == 0:
            span = slice(column, column + min(chosen_from, len(ahead)))
            pivots = factor.diagonal()[span, None]
            mask[span] = choose(column, (ahead[:chosen_from] / pivots).square().T).T
        return ahead[0] * mask[column]

    def settle_columns(here: slice, values: Tensor, block_factor: Tensor) -> Tensor:
        return settle_block(values, block_factor, lambda index, ahead: settle(here.start + index, ahead))

    settle_span(rest, factor, settle_columns, 0, len(rest), block)
    return (rest * mask).T.contiguous(), mask.T.contiguous()
