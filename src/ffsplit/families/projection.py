"""A projection of an FFN: ``nn.Linear`` or the transposed ``Conv1D`` of GPT-2, seen in one layout."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ffsplit.errors import ModelError


def is_projection(module: nn.Module) -> bool:
    """Whether the module is a dense ``[out, in]`` map of the last axis, its weight in floating point.

    Subclasses of ``nn.Linear`` that store packed codes (bitsandbytes, GPTQ) are not: their weight has another shape.
    """
    if not isinstance(module, (nn.Linear, Conv1D)):
        return False
    weight = module.weight
    return (
        isinstance(weight, Tensor) and weight.is_floating_point() and sorted(weight.shape) == sorted(features(module))
    )


def features(module: nn.Module) -> tuple[int, int]:
    """The sizes ``(out, in)`` of a projection."""
    if isinstance(module, Conv1D):
        return int(module.nf), int(module.nx)
    return cast(int, module.out_features), cast(int, module.in_features)


def get_weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The detached weight in the layout ``[out, in]`` and the bias; both share memory with the module."""
    weight = cast(Tensor, module.weight).detach()
    bias = cast("Tensor | None", module.bias)
    return (weight.T if isinstance(module, Conv1D) else weight), (None if bias is None else bias.detach())


def set_weight(module: nn.Module, weight: Tensor, bias: Tensor | None, path: str) -> None:
    """Give a projection a weight ``[out, in]`` of any size, in the dtype and on the device that it had.

    A module on the meta device takes the device of the weight. A bias that the module has and that is not given
    becomes zero.

    Raises:
        ModelError: a bias is given, and the module has none.
    """
    old = cast(nn.Parameter, module.weight)
    if bias is not None and module.bias is None:
        raise ModelError(f"{path}: a bias of {bias.numel()} values cannot be written, this projection has no bias")
    device = weight.device if old.is_meta else old.device

    def parameter(value: Tensor) -> nn.Parameter:
        # A copy: the stored tensor must own its memory, not be a view of a fused or transposed weight.
        copy = value.detach().to(device=device, dtype=old.dtype, copy=True).contiguous()
        return nn.Parameter(copy, requires_grad=old.requires_grad)

    out_features, in_features = weight.shape
    if module.bias is not None:
        module.bias = parameter(torch.zeros(out_features) if bias is None else bias)
    if isinstance(module, Conv1D):
        module.weight = parameter(weight.T)
        module.nf, module.nx = out_features, in_features
        return
    module.weight = parameter(weight)
    module.out_features, module.in_features = out_features, in_features  # type: ignore[assignment]
