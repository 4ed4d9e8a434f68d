"""Products with some rows of a matrix, for one token on a CPU, by kernels of torch that read no others.

Rows times a token are a product under a sparse pattern (`sampled_addmm`; float32 only), sums of weighted rows a bag of
embeddings. Threads share these by rows of the pattern and by bags, so there are as many of either as threads.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from ffsplit.kernels import cpu

MOST_CHOSEN = 2 / 3
"""Share of the rows above which reading all of them is faster: chosen ones are not fetched ahead."""
SMALLEST = 2**22
"""Weights of a matrix below which starting these kernels takes as long as they save."""
AVAILABLE = cpu.VECTORS in ("AVX2", "AVX512")
"""Elsewhere torch sums bags without vector instructions."""


def pays(chosen: int, rows: int) -> bool:
    """Whether so few rows are chosen that reading only them is faster."""
    return chosen <= MOST_CHOSEN * rows


def rows_times_token(
    x: Float[Tensor, "1 columns"], weight: Float[Tensor, "rows columns"], chosen: Int64[Tensor, " chosen"]
) -> Float[Tensor, " chosen"]:
    """``(weight x)[chosen]``; all rows are multiplied where torch has no kernel for some."""
    if x.dtype != torch.float32:
        return linear(x, weight)[0, chosen]
    _warn_no_more()
    parts = torch.get_num_threads()
    pattern = torch.sparse_csr_tensor(
        _bounds(len(chosen), parts, ends=True),
        chosen,
        x.new_zeros(len(chosen)),
        (parts, weight.shape[0]),
        check_invariants=False,
    )
    found: Tensor = torch.sparse.sampled_addmm(pattern, x.expand(parts, -1), weight.t(), beta=0.0)
    return found.values()


def weighted_rows(
    weight: Float[Tensor, "rows columns"], chosen: Int64[Tensor, " chosen"], factors: Float[Tensor, " chosen"]
) -> Float[Tensor, "1 columns"]:
    """``factors weight[chosen]``."""
    parts = torch.get_num_threads()
    bags = embedding_bag(chosen, weight, _bounds(len(chosen), parts), per_sample_weights=factors, mode="sum")
    return bags if parts == 1 else bags.sum(0, keepdim=True)


def _bounds(count: int, parts: int, *, ends: bool = False) -> Int64[Tensor, " bounds"]:
    """Where each of equal parts starts, and the last one ends."""
    return torch.arange(parts + ends) * count // parts


@cache
def _warn_no_more() -> None:
    """Torch says once a process that sparse tensors may change; nothing here depends on more than this file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)
