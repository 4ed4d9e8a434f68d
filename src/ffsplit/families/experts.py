"""Mixture-of-experts layers: recognised by structure, counted, and kept out of the way while tracing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Experts:
    """A module that holds the FFNs of many experts.

    Attributes:
        path: module path.
        class_name: class of the module.
        experts: how many.
        parameters: their parameters, biases included.
        fused: whether they are three-dimensional parameters of one module, rather than a list of modules.
    """

    path: str
    class_name: str
    experts: int
    parameters: int
    fused: bool


def find_experts(model: nn.Module) -> list[Experts]:
    """The outermost modules of a model that hold experts."""
    found: list[Experts] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer.path}.") for outer in found):
            continue
        count = _fused_count(module) or _listed_count(path, module)
        if count:
            parameters = sum(parameter.numel() for parameter in module.parameters())
            found.append(Experts(path, type(module).__name__, count, parameters, fused=bool(_fused_count(module))))
    return found


# Names of stacked weights in classes that are not named after experts: before the activation, after it.
_STACKED = (("gate_up_proj", "down_proj"), ("up_proj", "down_proj"), ("w1", "w2"), ("wi", "wo"), ("fc1", "fc2"))


def _fused_count(module: nn.Module) -> int:
    """Experts of a module with stacked weights ``[experts, out, in]``, or all experts' rows in one matrix (DBRX)."""
    stacked = {name: p.shape[0] for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
    named = "expert" in type(module).__name__.lower()
    known = any(up in stacked and down in stacked for up, down in _STACKED)
    if len(set(stacked.values())) == 1 and (named or known):
        return next(iter(stacked.values()))
    if named and sum(p.dim() == 2 for p in module.parameters(recurse=False)) > 1:
        count = getattr(module, "num_experts", None) or getattr(module, "moe_num_experts", None)
        return count if isinstance(count, int) and count > 1 else 0
    return 0


def _listed_count(path: str, module: nn.Module) -> int:
    """Experts of a list or dictionary of modules that is called ``experts``."""
    is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict)) and "expert" in path.rpartition(".")[2].lower()
    weighty = is_list and any(p.dim() >= 2 for p in module.parameters())
    return len(list(module.children())) if weighty and len(list(module.children())) > 1 else 0


@contextmanager
def silenced(model: nn.Module, experts: list[Experts]) -> Iterator[None]:
    """Let fused experts return zeros: their routing reads data, which the meta device does not have."""
    modules = [model.get_submodule(found.path) for found in experts if found.fused]
    try:
        for module in modules:
            module.forward = _zeros  # type: ignore[method-assign]
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def _zeros(*args: Any, **kwargs: Any) -> Tensor:
    first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return torch.zeros_like(first)
