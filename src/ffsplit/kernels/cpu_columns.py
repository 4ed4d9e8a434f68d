"""Few tokens times tall float32 matrices on AMD CPUs, whose products go faster column after column.

torch's product of a token and a matrix reads it row after row. The second factors of low-rank matrices have many
short rows, and reading the same numbers by columns is up to 2.2 times as fast on a Zen 5: for up to two tokens, and
where rows are very short for more (``benchmarks/cpu_columns.py``). So a copy in that order is kept where there is
room for decoded matrices.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, float32
from torch.nn.functional import linear

from ffsplit.kernels import cpu
from ffsplit.kernels.cache import DerivedCache, counted_transpose
from ffsplit.kernels.dispatch import SMALLEST, takes_kernels

MOST_TOKENS = 2
NARROW, MOST_OF_NARROW = 256, 16
"""Of matrices with so few columns, up to how many tokens."""
TALL = 2
"""Rows for a column from which on it pays."""
PAYS = cpu.VECTORS == "AVX512" and "AMD" in str(cpu.CAPABILITIES.get("cpu_name"))
"""Whether this CPU is of the kind on which it was measured."""
_KEY = "by columns"


def tall_linear(
    x: Float[Tensor, "*tokens columns"], weight: Float[Tensor, "rows columns"], cache: DerivedCache
) -> Float[Tensor, "*tokens rows"]:
    """``x W^T``.

    Args:
        x: inputs.
        weight: not necessarily tall; nothing is kept of others.
        cache: of this matrix alone.
    """
    if not PAYS or not _pays(x, weight) or not cache.has_room(_KEY, (weight,), weight.nbytes):
        return linear(x, weight)
    return linear(x, cache.get(_KEY, (weight,), lambda: counted_transpose(weight)).t())


def _pays(x: Tensor, weight: Tensor) -> bool:
    if x.dtype != float32 or weight.dtype != float32 or weight.device.type != "cpu":
        return False
    rows, columns = weight.shape
    if rows < TALL * columns or weight.numel() < SMALLEST or not takes_kernels(x, (weight,)):
        return False
    return x.numel() <= columns * (MOST_OF_NARROW if columns <= NARROW else MOST_TOKENS)
