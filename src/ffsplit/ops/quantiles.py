"""Quantiles of more values than fit into memory: streaming passes, counts of fixed size, no range to be known before.

The bins are the leading bits of float32 (sign, exponent and 12 bits of mantissa), which sort like the numbers. A bin is
therefore at most ``2^-12`` of its values wide, over the whole range of float32, and nothing is sampled. Where a bin
holds too many values (near the minimum of a SiLU or GELU they crowd), a second pass counts its values one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

BITS = 21
"""Leading bits that make a bin: 2^21 counts, 16 MiB."""
TOLERANCE = 1e-4
"""Share of all values in the bin of a quantile from which on a second pass takes it apart."""
_REST = 32 - BITS
_SIGN = 1 << 31
_INFINITE = 0x7F800000


@dataclass
class Histogram:
    """Counts of values by their leading bits; sums of histograms are histograms.

    Attributes:
        counts: values in every bin, in the order of the numbers.
    """

    counts: Int64[Tensor, " bins"]

    @classmethod
    def zeros(cls, device: torch.device | str = "cpu") -> Histogram:
        return cls(torch.zeros(1 << BITS, dtype=torch.int64, device=device))

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def finite(self) -> bool:
        """Whether no Inf or NaN was among the values."""
        above = (_INFINITE | _SIGN) >> _REST
        below = (~(_INFINITE | _SIGN) & 0xFFFFFFFF) >> _REST
        return int(self.counts[above:].sum() + self.counts[: below + 1].sum()) == 0

    def add(self, values: Tensor) -> None:
        """Count the values, whatever their shape; they are rounded to float32."""
        self.counts += torch.bincount(_ordered(values) >> _REST, minlength=len(self.counts))

    def quantile(self, share: float) -> float:
        """The end of the first bin up to which at least ``share`` of the values lie; zero without values.

        Args:
            share: 0 to 1.

        Returns:
            A threshold t, less than ``2^-12`` of itself above the exact quantile.
        """
        return _number(((self.bin(share) + 1) << _REST) - 1) if self.total else 0.0

    def bin(self, share: float) -> int:
        """Index of the first bin up to which at least ``share`` of the values lie."""
        return _first(self.counts, _rank(share, self.total))


def quantile(chunks: Callable[[], Iterable[Tensor]], share: float, counted: Histogram) -> float:
    """A quantile of streamed values, in one pass more if one bin of their histogram is too coarse for it.

    Args:
        chunks: starts a pass over the same values.
        share: 0 to 1.
        counted: the histogram of the values.

    Returns:
        A threshold t. Of the values, a share of at least ``share`` is at most t; the surplus is below `TOLERANCE`, but
        for values that are equal in float32 (the zeros of a ReLU), which no threshold separates.
    """
    total, found = counted.total, counted.bin(share)
    if int(counted.counts[found]) <= TOLERANCE * total:
        return counted.quantile(share)
    below = int(counted.counts[:found].sum())
    inside = torch.zeros(1 << _REST, dtype=torch.int64, device=counted.counts.device)
    for values in chunks():
        ordered = _ordered(values)
        inside += torch.bincount(ordered[ordered >> _REST == found] & ((1 << _REST) - 1), minlength=len(inside))
    return _number((found << _REST) + _first(inside, _rank(share, total) - below))


def _rank(share: float, total: int) -> int:
    """How many values make up the share, at least one."""
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} is not in 0..1")
    # A product such as 0.55 * 100 is a little above the whole number that is meant.
    return max(math.ceil(share * total - 1e-9 * total), 1)


def _first(counts: Int64[Tensor, " bins"], rank: int) -> int:
    return int(torch.searchsorted(counts.cumsum(0), rank))


def _ordered(values: Tensor) -> Int64[Tensor, " values"]:
    """The bits of float32 as whole numbers that sort like the values."""
    # Adding zero makes a negative zero positive: the two are one number and belong into one bin.
    bits = (values.detach().flatten().float() + 0.0).view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >= _SIGN, bits ^ 0xFFFFFFFF, bits | _SIGN)


def _number(ordered: int) -> float:
    """The float32 whose ordered bits these are."""
    bits = ordered ^ _SIGN if ordered >= _SIGN else ordered ^ 0xFFFFFFFF
    signed = bits - (1 << 32) if bits >= _SIGN else bits
    return float(torch.tensor(signed, dtype=torch.int32).view(torch.float32))
