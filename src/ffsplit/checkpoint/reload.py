"""The proof that a stored checkpoint is the model in memory: load it afresh and compare outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from ffsplit.errors import CheckpointError, ModelError
from ffsplit.families.inputs import candidate_inputs

# Loading on another device than the model's may round differently; on the same one 32-bit outputs are equal to the bit.
TOLERANCE = 1e-3
# In 16 bits the same weights at other addresses give other roundings; the weights themselves are compared bit by bit.
HALF_TOLERANCE = 3e-2


def reload_and_compare(model: PreTrainedModel, folder: Path) -> float:
    """Load ``folder`` with the model's own class and compare both on small inputs.

    Returns:
        the relative difference of the outputs.

    Raises:
        CheckpointError: the folder does not load, weights are missing, or the outputs differ.
    """
    try:
        fresh, info = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the files that were just written do not load: {error}") from error
    lost = sorted(set(info["missing_keys"]) | set(info["unexpected_keys"]))
    if lost:
        raise CheckpointError(f"{folder}: {len(lost)} tensors do not survive a reload, first {lost[0]!r}")
    fresh = fresh.eval().to(next(model.parameters()).device)
    _same_unstored_buffers(model, fresh)
    _refuse_changed_tensors(model, fresh, folder)
    difference = _difference(model, fresh)
    allowed = TOLERANCE if model.dtype.itemsize >= 4 else HALF_TOLERANCE
    if not difference <= allowed:
        raise CheckpointError(
            f"{folder}: the reloaded model's outputs differ by {difference:.3g} (relative, allowed {allowed:g})"
        )
    return difference


def _refuse_changed_tensors(model: PreTrainedModel, fresh: PreTrainedModel, folder: Path) -> None:
    """Every stored tensor must come back as it was; a dtype that the family insists on may differ."""
    loaded = fresh.state_dict()
    for name, tensor in model.state_dict().items():
        if name in loaded and not torch.equal(loaded[name].to(tensor.dtype), tensor):
            raise CheckpointError(f"{folder}: the tensor {name!r} is another one after a reload")


def _same_unstored_buffers(model: PreTrainedModel, fresh: PreTrainedModel) -> None:
    """Give the fresh model the buffers that no file holds where ``model.to(dtype)`` has cast those of the model.

    ``from_pretrained`` makes rotary frequencies anew, in float32; that difference says nothing about the files.
    """
    for path, module in fresh.named_modules():
        mine = dict(model.get_submodule(path).named_buffers(recurse=False))
        for name in module._non_persistent_buffers_set & mine.keys():
            buffer = module._buffers[name]
            if buffer is not None and buffer.dtype != mine[name].dtype:
                module._buffers[name] = mine[name]


@torch.no_grad()
def _difference(model: PreTrainedModel, fresh: PreTrainedModel) -> float:
    was_training = model.training
    model.eval()
    try:
        for inputs in candidate_inputs(model):
            try:
                expected = _first_float(_seeded(model, inputs))
            except (ValueError, RuntimeError, TypeError, IndexError):
                continue
            found = _first_float(_seeded(fresh, inputs))
            return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
    finally:
        model.train(was_training)
    raise ModelError(f"{type(model).__name__} ran on none of the inputs made up for it, so a reload cannot be compared")


def _seeded(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    """One forward with fixed random numbers: masked autoencoders draw some even in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(**inputs)


def _first_float(output: Any) -> Tensor:
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf.float()
    raise ModelError("the model returned no floating-point tensor to compare")
