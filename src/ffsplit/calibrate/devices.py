"""Moving a model's parts to the compute device for their turn, and home again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from ffsplit.families.blocks import Block


@contextmanager
def visiting(model: PreTrainedModel, blocks: Sequence[Block], device: torch.device) -> Iterator[None]:
    """Keep what is outside the blocks (embeddings, norms, head) on a device; everything goes home at the end.

    Modules that were put in meanwhile go where the model's first parameter came from.
    """
    homes = {name: parameter.device for name, parameter in model.named_parameters()}
    default = next(iter(homes.values()))
    move_outside_blocks(model, blocks, device)
    try:
        yield
    finally:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(default)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(homes.get(name, default))


@contextmanager
def moved_to(device: torch.device, models: Sequence[nn.Module]) -> Iterator[None]:
    """Keep whole models on a device; each goes home, to where its first parameter was, at the end."""
    homes = [next(model.parameters()).device for model in models]
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        for model, home in zip(models, homes, strict=True):
            model.to(home)


def move_outside_blocks(model: nn.Module, blocks: Sequence[Block], device: torch.device) -> None:
    """Move everything that is not inside one of the blocks (embeddings, norms, head) to a device."""
    inside = {id(module) for block in blocks for module in model.get_submodule(block.path).modules()}
    for module in model.modules():
        if id(module) in inside:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


@contextmanager
def whole_model_at_work(model: nn.Module, blocks: Sequence[Block], device: torch.device) -> Iterator[None]:
    """Let the whole model run on a device: all of it moves there if it fits well, else each block for its turn.

    The parts outside the blocks are there already (see :func:`visiting`, which also takes everything home again).
    """
    if device.type == "cpu":
        yield
        return
    modules = [model.get_submodule(block.path) for block in blocks]
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    free, _ = torch.accelerator.get_memory_info(device)
    if needed < free / 2:
        for module in modules:
            module.to(device)
        yield
        return
    homes = [next(module.parameters()).device for module in modules]
    handles = [module.register_forward_pre_hook(lambda module, _: module.to(device) and None) for module in modules]
    handles += [
        module.register_forward_hook(lambda module, _args, _output, home=home: module.to(home) and None)
        for module, home in zip(modules, homes, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
