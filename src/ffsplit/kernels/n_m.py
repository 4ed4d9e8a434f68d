"""Forwards of an N:M sparse matrix: decode and multiply anywhere, sparse tensor cores for 2:4 where torch has them.

The plain path is the reference. The other one is chosen for inference alone (torch's kernel has no gradient), eagerly
(its tensor class cannot be traced with a cache beside it), in half precision, on NVIDIA hardware from Ampere on.
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import linear
from torch.sparse import to_sparse_semi_structured

from ffsplit.kernels.cache import DerivedCache
from ffsplit.kernels.dispatch import is_traced
from ffsplit.ops.packing import unpack

SPARSE_CORES = (8, 0)
"""Compute capability from which NVIDIA's tensor cores multiply 2:4 matrices."""
TILE = (32, 64)
"""Rows and columns must be multiples of these: the stricter of the two kernels behind torch's one function."""


def position_bits(m: int) -> int:
    """Bits that tell ``m`` positions apart."""
    return max((m - 1).bit_length(), 1)


def decode(
    values: Float[Tensor, "rows kept"],
    positions: UInt8[Tensor, "rows packed"],
    *,
    n: int,
    m: int,
    columns: int,
    dtype: torch.dtype,
) -> Float[Tensor, "rows columns"]:
    """The dense matrix; gradients flow to ``values``.

    Args:
        values: ``n`` survivors of every group of ``m`` columns, in the order of the columns.
        positions: where in its group each survivor stands, packed by :func:`ffsplit.ops.packing.pack`.
        n: survivors a group.
        m: columns a group; the last group may reach beyond the matrix.
        columns: of the matrix.
        dtype: of the result.
    """
    rows, kept = values.shape
    where = unpack(positions, position_bits(m), kept).view(rows, kept // n, n).long()
    groups = values.new_zeros(rows, kept // n, m, dtype=dtype)
    filled = groups.scatter(-1, where, values.to(dtype).view(rows, kept // n, n))
    return filled.view(rows, kept // n * m)[:, :columns]


def _for_sparse_cores(values: Tensor, positions: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """A 2:4 matrix in the layout of the sparse tensor cores, which takes as much memory as the stored one."""
    dense = decode(values.detach(), positions, n=2, m=4, columns=columns, dtype=dtype)
    with warnings.catch_warnings():
        # The method is marked experimental; torch saying so once a process would add nothing.
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor", UserWarning)
        found: Tensor = to_sparse_semi_structured(dense.contiguous())
    return found


def n_m_linear(
    x: Float[Tensor, "*tokens columns"],
    values: Float[Tensor, "rows kept"],
    positions: UInt8[Tensor, "rows packed"],
    *,
    n: int,
    m: int,
    cache: DerivedCache,
) -> Float[Tensor, "*tokens rows"]:
    """``x W^T`` for an N:M sparse ``W``, by whichever path can; see :func:`decode` for the arguments."""
    columns = x.shape[-1]
    if (n, m) == (2, 4) and _has_sparse_cores(x, values):
        weight = cache.get(x.dtype, (values, positions), lambda: _for_sparse_cores(values, positions, columns, x.dtype))
        flat: Tensor = linear(x.reshape(-1, columns).contiguous(), weight)
        return flat.reshape(*x.shape[:-1], values.shape[0])
    return linear(x, decode(values, positions, n=n, m=m, columns=columns, dtype=x.dtype))


def _has_sparse_cores(x: Tensor, values: Tensor) -> bool:
    """Whether torch's 2:4 kernel takes these tensors and is right for what is being done with them."""
    if x.device.type != "cuda" or is_traced() or torch.version.hip is not None:
        return False
    differentiated = torch.is_grad_enabled() and (x.requires_grad or values.requires_grad)
    fits = values.shape[0] % TILE[0] == 0 and x.shape[-1] % TILE[1] == 0
    if differentiated or values.is_inference() or not fits or not x.numel():
        return False
    if x.dtype not in (torch.float16, torch.bfloat16) or not torch.backends.cusparselt.is_available():
        return False
    capability: tuple[int, int] = torch.get_device_module(x.device).get_device_capability(x.device)
    return capability >= SPARSE_CORES
