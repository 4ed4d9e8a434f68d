"""Naming an activation that a model computes with a function, by comparing the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS, ACT2FN

_TOLERANCE = 1e-4


def identify(
    model: PreTrainedModel, act: str | None, function: Callable[[Tensor], Tensor]
) -> tuple[str | None, str | None] | None:
    """``(module path, None)`` or ``(None, ACT2FN name)`` of what is between two projections.

    Args:
        model: the model, with or without weights.
        act: path of the module that seems to compute it, if any.
        function: what was really computed, as traced.

    Returns:
        ``None`` when the traced function is neither that module nor one that transformers has a name for.
    """
    grid = torch.linspace(-8, 8, 257).unsqueeze(0)
    wanted = _evaluate(function, grid)
    if act is not None:
        module = model.get_submodule(act)
        got = _evaluate(module, grid)
        if wanted is None or got is None or _equal(got, wanted):
            return act, None
    if wanted is None:
        return None
    for name in _names(model):
        got = _evaluate(ACT2FN[name], grid)
        if got is not None and _equal(got, wanted):
            return None, name
    return None


def _names(model: PreTrainedModel) -> Iterator[str]:
    """Names without parameters of their own, those that the config mentions first."""
    plain = [name for name in ACT2CLS if name not in ("prelu", "xielu")]
    mentioned = {value for value in model.config.to_dict().values() if isinstance(value, str)}
    yield from sorted(plain, key=lambda name: name not in mentioned)


def _evaluate(function: Callable[[Tensor], Tensor] | nn.Module, grid: Tensor) -> Tensor | None:
    """The function's values, ``None`` where they cannot be known: constants on the meta device or per neuron."""
    try:
        with torch.no_grad():
            values = function(grid)
    except (RuntimeError, TypeError):
        return None
    return values.float() if values.device == grid.device and values.shape == grid.shape else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
