"""The proof that a stored checkpoint is the model in memory: load it afresh and compare outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from ffsplit.errors import CheckpointError, ModelError
from ffsplit.families.inputs import candidate_inputs

# Loading on another device than the model's may round differently; on the same one the outputs are equal to the bit.
TOLERANCE = 1e-3


def reload_and_compare(model: PreTrainedModel, folder: Path) -> float:
    """Load ``folder`` with the model's own class and compare both on small inputs.

    Returns:
        the relative difference of the outputs.

    Raises:
        CheckpointError: the folder does not load, weights are missing, or the outputs differ.
    """
    fresh, info = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    lost = sorted(set(info["missing_keys"]) | set(info["unexpected_keys"]))
    if lost:
        raise CheckpointError(f"{folder}: {len(lost)} tensors do not survive a reload, first {lost[0]!r}")
    fresh = fresh.eval().to(next(model.parameters()).device)
    difference = _difference(model, fresh)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{folder}: the reloaded model's outputs differ by {difference:.3g} (relative, allowed {TOLERANCE:g})"
        )
    return difference


@torch.no_grad()
def _difference(model: PreTrainedModel, fresh: PreTrainedModel) -> float:
    was_training = model.training
    model.eval()
    try:
        for inputs in candidate_inputs(model):
            try:
                expected = _first_float(model(**inputs))
            except (ValueError, RuntimeError, TypeError, IndexError):
                continue
            found = _first_float(fresh(**inputs))
            return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
    finally:
        model.train(was_training)
    raise ModelError(f"{type(model).__name__} ran on none of the inputs made up for it, so a reload cannot be compared")


def _first_float(output: Any) -> Tensor:
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf.float()
    raise ModelError("the model returned no floating-point tensor to compare")
