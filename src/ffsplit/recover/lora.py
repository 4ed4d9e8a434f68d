"""Low-rank adapters on the dense matrices of the branches, by the library PEFT, merged at the end."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ffsplit.errors import RecipeError
from ffsplit.ffn.projections import Dense, Tied
from ffsplit.recover.weights import sums_of

ALPHA_PER_RANK = 2


def require_peft() -> Any:
    """The library.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise RecipeError("lora: adapters need the library peft; pip install ffsplit[recover]") from error


@contextmanager
def adapted(model: nn.Module, rank: int, seed: int) -> Iterator[dict[str, nn.Parameter]]:
    """Adapters beside every dense matrix of the compressed FFNs; afterwards they are part of the matrices.

    Gives the adapters' parameters by name.

    Raises:
        RecipeError: as :func:`adaptable`, or PEFT is not installed.

    Reference: Hu et al., LoRA, arXiv 2106.09685.
    """
    peft = require_peft()
    places = adaptable(model, rank)
    stored = {path: model.get_submodule(path) for path in places}
    for path, projection in stored.items():
        model.set_submodule(path, _as_linear(projection))
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA_PER_RANK * rank, lora_dropout=0.0, target_modules=places)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuner = peft.tuners.lora.LoraModel(model, {"default": config}, "default")
    try:
        yield {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    finally:
        tuner.merge_and_unload()
        for path, projection in stored.items():
            projection.weight.data = model.get_submodule(path).weight.data
            model.set_submodule(path, projection)


def adaptable(model: nn.Module, rank: int) -> list[str]:
    """The paths of the dense matrices of the compressed FFNs, which get adapters of this rank.

    Raises:
        RecipeError: there is none, FFNs share theirs, or none of them has this rank.
    """
    places = _dense_places(model)
    if not places:
        raise RecipeError("lora: the compressed FFNs have no dense matrices to adapt; leave lora out")
    if any(isinstance(module, Tied) for module in model.modules()):
        # What is tied reads its owner's matrix, beside which it would not see the adapter while it is trained.
        raise RecipeError("lora: some of the compressed FFNs share their matrices; leave lora out")
    largest = max(min(model.get_parameter(f"{path}.weight").shape) for path in places)
    if rank > largest:
        raise RecipeError(f"lora={rank}: no matrix to adapt has a rank above {largest}, the largest allowed")
    return places


def _dense_places(model: nn.Module) -> list[str]:
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in sums_of(model).items()
        for name, inside in module.named_modules()
        if isinstance(inside, Dense) and inside.weight.numel()
    ]


def _as_linear(projection: nn.Module) -> nn.Linear:
    """The same matrix as the layer that PEFT knows."""
    assert isinstance(projection, Dense)
    rows, columns = projection.spec.shape
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = projection.weight
    return layer
