"""Which parts of a branch work for a token. One file a selector: its structure and its module."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from ffsplit.ffn.selectors.base import Selector, SelectorSpecBase
from ffsplit.ffn.selectors.input_threshold import InputThreshold, InputThresholdSpec
from ffsplit.ffn.selectors.router import Router, RouterSpec
from ffsplit.ffn.selectors.threshold import Threshold, ThresholdSpec
from ffsplit.ffn.selectors.top_inputs import TopInputs, TopInputsSpec

SelectorSpec = Annotated[InputThresholdSpec | RouterSpec | ThresholdSpec | TopInputsSpec, Field(discriminator="kind")]
"""Any selector, told apart by its ``kind``."""

SELECTORS: dict[type[SelectorSpecBase], type[Selector]] = {
    InputThresholdSpec: InputThreshold,
    RouterSpec: Router,
    ThresholdSpec: Threshold,
    TopInputsSpec: TopInputs,
}


def empty_selector(spec: SelectorSpecBase, dtype: torch.dtype, device: torch.device) -> Selector:
    """An uninitialised selector of the given structure, ready to be loaded into."""
    return SELECTORS[type(spec)].empty(spec, dtype, device)


__all__ = [
    "SELECTORS",
    "InputThreshold",
    "InputThresholdSpec",
    "Router",
    "RouterSpec",
    "Selector",
    "SelectorSpec",
    "SelectorSpecBase",
    "Threshold",
    "ThresholdSpec",
    "TopInputs",
    "TopInputsSpec",
    "empty_selector",
]
