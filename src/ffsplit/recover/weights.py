"""Which parameters a recovery trains, in which precision, and what must come out as it went in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from ffsplit.errors import ModelError
from ffsplit.families import find_ffns, read, replace
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN, dense_branch


def sums_of(model: nn.Module) -> dict[str, SumFFN]:
    """The compressed FFNs of a model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SumFFN)}


def specs_of(model: nn.Module) -> dict[str, SumSpec]:
    """The structures of the compressed FFNs of a model, by path."""
    return {path: module.spec for path, module in sums_of(model).items()}


def as_sums(model: PreTrainedModel) -> dict[str, SumFFN]:
    """The compressed FFNs of a model. Those of a plain one, whose FFNs are merely narrower, become sums first.

    Raises:
        ModelError: the model has no FFNs.
    """
    if not (found := sums_of(model)):
        for site in find_ffns(model).sites:
            ffn = read(model, site)
            replace(model, site, SumFFN(ffn.d_model, [dense_branch(ffn)], bias=ffn.down_bias))
        model.requires_grad_(False)
        found = sums_of(model)
    return found


@contextmanager
def same_structure(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, every sum must have the structure afterwards that it had before.

    Raises:
        ModelError: one has another.
    """
    before = specs_of(model)
    yield
    after = specs_of(model)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    if changed:
        raise ModelError(f"recovery changed the structure of {changed[0]}, which it must not")


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Master weights: small steps would be lost in 16 bits. Afterwards every parameter has its dtype again."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])


@contextmanager
def training_only(model: nn.Module, chosen: dict[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for the chosen parameters and no others; afterwards for none."""
    model.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        model.requires_grad_(False)


def branch_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The floating-point parameters of all compressed FFNs; what a tied projection shares counts once."""
    return {
        f"{path}.{name}".lstrip("."): parameter
        for path, module in sums_of(model).items()
        for name, parameter in module.named_parameters()
        if _has_weights(name, parameter)
    }


def all_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every floating-point parameter of a model but those of activations."""
    return {name: parameter for name, parameter in model.named_parameters() if _has_weights(name, parameter)}


def _has_weights(name: str, parameter: nn.Parameter) -> bool:
    """Not the tripwire, which is empty, and not an activation's own constants."""
    return bool(parameter.numel()) and parameter.is_floating_point() and ".act." not in f".{name}"


def finite(model: nn.Module) -> bool:
    """Whether every trained number is one."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in branch_parameters(model).values())
