"""What a model returns on made-up inputs, and how far a change of the model has moved it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ffsplit.errors import ModelError
from ffsplit.families.forward import Inputs, drive
from ffsplit.families.verify import HALF_TOLERANCE, TOLERANCE

Outputs = Mapping[str, list[Tensor]]


def outputs_of(model: PreTrainedModel, watched: Callable[[nn.Module], bool], inputs: Inputs | None = None) -> Outputs:
    """The floating-point tensors that modules returned last, in float32, by the module's path.

    Args:
        model: run once, and its sub-models that the run does not reach.
        watched: which modules to look at.
        inputs: keyword arguments of its ``forward``; tiny ones are made up when not given.
    """
    recorders = drive(model, lambda _kwargs: _Recorder(model, watched), inputs).values()
    return {path: tensors for recorder in recorders for path, tensors in recorder.outputs.items()}


def worst_change(before: Outputs, after: Outputs) -> tuple[str, float]:
    """The module whose outputs have changed the most, and by how much, relative to their norm; NaN counts as worst."""
    changes = {
        path: max((relative_change(*pair) for pair in zip(tensors, after[path], strict=True)), key=_rank, default=0.0)
        for path, tensors in before.items()
    }
    worst = max(changes, key=lambda path: _rank(changes[path]))
    return worst, changes[worst]


def refuse_change(model: PreTrainedModel, before: Outputs, after: Outputs, what: str, allowed: float) -> None:
    """Refuse a change of weights that changes what a model returns.

    Args:
        model: for the message.
        before: of it.
        after: of it.
        what: was done, for the message.
        allowed: relative change of any output.

    Raises:
        ModelError: the worst change is above what is allowed, or no number.
    """
    path, error = worst_change(before, after)
    if not error <= allowed:  # NaN must not pass
        raise ModelError(
            f"{path or type(model).__name__}: {what} changes what it returns by {error:.3g} "
            f"(relative, allowed {allowed:.3g}), so they were left as they were"
        )


def _rank(change: float) -> float:
    return float("inf") if change != change else change


def relative_change(old: Tensor, new: Tensor) -> float:
    """``||new - old|| / ||old||``."""
    return float((new - old).norm() / old.norm().clamp_min(torch.finfo(torch.float32).tiny))


def allowed_change(model: PreTrainedModel) -> float:
    """What rounding alone may change, for the model's dtype."""
    return TOLERANCE.get(model.dtype, HALF_TOLERANCE)


class _Recorder:
    """Context manager around one forward. Removes its hooks in every case."""

    def __init__(self, model: nn.Module, watched: Callable[[nn.Module], bool]) -> None:
        self._modules = {path: module for path, module in model.named_modules() if watched(module)}
        self._handles: list[RemovableHandle] = []
        self.outputs: dict[str, list[Tensor]] = {}

    def __enter__(self) -> Self:
        for path, module in self._modules.items():

            def keep(_module: nn.Module, _args: Any, output: Any, path: str = path) -> None:
                leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
                self.outputs[path] = [leaf.float().clone() for leaf in leaves if leaf.is_floating_point()]

            self._handles.append(module.register_forward_hook(keep))
        return self

    def __exit__(self, *_exception: object) -> None:
        for handle in self._handles:
            handle.remove()
