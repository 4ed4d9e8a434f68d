"""Putting sequences of similar length into one batch, so that little of it is padding."""

from __future__ import annotations

import numpy as np

BUCKET = 50
"""Batches among whose sequences those of similar length are put together."""


def alike(order: np.ndarray, lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """A random order with every stretch of :data:`BUCKET` batches sorted by length.

    Args:
        order: numbers of sequences.
        lengths: of all sequences, by their number.
        batch_size: sequences of a batch.
    """
    width = BUCKET * batch_size
    buckets = [order[start : start + width] for start in range(0, len(order), width)]
    return np.concatenate([bucket[np.argsort(lengths[bucket], kind="stable")] for bucket in buckets])
