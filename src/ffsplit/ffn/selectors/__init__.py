"""Which parts of a branch work for a token. One file a selector: its structure and its module."""

from __future__ import annotations

import torch

from ffsplit.ffn.selectors.base import Selector, SelectorSpecBase
from ffsplit.ffn.selectors.threshold import Threshold, ThresholdSpec

SelectorSpec = ThresholdSpec
"""Any selector, told apart by its ``kind``."""

SELECTORS: dict[type[SelectorSpecBase], type[Selector]] = {
    ThresholdSpec: Threshold,
}


def empty_selector(spec: SelectorSpecBase, dtype: torch.dtype, device: torch.device) -> Selector:
    """An uninitialised selector of the given structure, ready to be loaded into."""
    return SELECTORS[type(spec)].empty(spec, dtype, device)


__all__ = ["SELECTORS", "Selector", "SelectorSpec", "SelectorSpecBase", "Threshold", "ThresholdSpec", "empty_selector"]
