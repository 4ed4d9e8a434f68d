"""Which parts of a branch work for a token. One file a selector: its structure and its module."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from ffsplit.ffn.selectors.base import Selector, SelectorSpecBase
from ffsplit.ffn.selectors.input_threshold import InputThreshold, InputThresholdSpec
from ffsplit.ffn.selectors.predictor import Predictor, PredictorSpec
from ffsplit.ffn.selectors.router import Router, RouterSpec
from ffsplit.ffn.selectors.threshold import Threshold, ThresholdSpec
from ffsplit.ffn.selectors.top_inputs import TopInputs, TopInputsSpec
from ffsplit.ffn.selectors.top_k import TopK, TopKSpec

SelectorSpec = Annotated[
    InputThresholdSpec | PredictorSpec | RouterSpec | ThresholdSpec | TopInputsSpec | TopKSpec,
    Field(discriminator="kind"),
]
"""Any selector, told apart by its ``kind``."""

SELECTORS: dict[type[SelectorSpecBase], type[Selector]] = {
    InputThresholdSpec: InputThreshold,
    PredictorSpec: Predictor,
    RouterSpec: Router,
    ThresholdSpec: Threshold,
    TopInputsSpec: TopInputs,
    TopKSpec: TopK,
}


def empty_selector(spec: SelectorSpecBase, dtype: torch.dtype, device: torch.device) -> Selector:
    """An uninitialised selector of the given structure, ready to be loaded into."""
    return SELECTORS[type(spec)].empty(spec, dtype, device)


__all__ = [
    "SELECTORS",
    "InputThreshold",
    "InputThresholdSpec",
    "Predictor",
    "PredictorSpec",
    "Router",
    "RouterSpec",
    "Selector",
    "SelectorSpec",
    "SelectorSpecBase",
    "Threshold",
    "ThresholdSpec",
    "TopInputs",
    "TopInputsSpec",
    "TopK",
    "TopKSpec",
    "empty_selector",
]
