"""Compressions of tiny models that many tests start from, fitted once."""

from __future__ import annotations

import copy
import json
from typing import Any

from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

import ffsplit
from ffsplit.provenance import hash_model

_RESULTS: dict[str, ffsplit.CompressionResult] = {}


def fitted(dense: PreTrainedModel, recipe: dict[str, Any], calibration: Any) -> ffsplit.CompressionResult:
    """``ffsplit.compress`` of a copy: equal weights, recipe and text are fitted once, and every caller gets a copy.

    For tests of what is done with a compressed model. Those of the compression itself call it themselves.
    """
    text = [(str(leaf.dtype), leaf.tolist()) for leaf in pytree.tree_leaves(calibration)]
    key = json.dumps([type(dense).__name__, dense.config.to_json_string(), hash_model(dense), recipe, text])
    if key not in _RESULTS:
        _RESULTS[key] = ffsplit.compress(
            copy.deepcopy(dense), recipe=copy.deepcopy(recipe), calibration=calibration, device="cpu"
        )
    return copy.deepcopy(_RESULTS[key])
