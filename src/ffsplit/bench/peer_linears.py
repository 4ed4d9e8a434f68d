"""Linear layers of torch and of installed packages, made from a dense weight."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

GROUP = 128
INNER_TILES = 8
"""Of torch's int4 layout on CUDA."""


class HalfLinear(nn.Module):
    """bfloat16 weights and products, inputs and outputs in their own dtype."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.to(torch.bfloat16))
        self.register_buffer("bias", None if bias is None else bias.to(torch.bfloat16))

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return linear(x.to(torch.bfloat16), self.weight, self.bias).to(x.dtype)  # type: ignore[arg-type]


class Int8DynamicLinear(nn.Module):
    """What ``quantize_dynamic`` of torch makes of a linear layer: int8 weights, inputs rounded on the fly."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        super().__init__()
        scale = (weight.detach().float().abs().amax(1) / 127).clamp_min(1e-12).double()
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch plans to remove the types that its own int8 kernels need
            codes = torch.quantize_per_channel(weight.detach().float(), scale, zeros, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(codes, None if bias is None else bias.float())

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        found: Tensor = torch.ops.quantized.linear_dynamic(x.float(), self.packed)
        return found.to(x.dtype)


class Int4Linear(nn.Module):
    """torch's own int4 product, groups of 128."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        super().__init__()
        codes, scale = int4_codes(weight)
        parts = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()
        self.on_cpu = weight.device.type == "cpu"
        dtype = weight.dtype if self.on_cpu else torch.bfloat16
        self.register_buffer("parts", parts.to(dtype))
        self.register_buffer("bias", bias)
        if self.on_cpu:
            self.register_buffer("codes", torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1))
        else:
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
            self.register_buffer("codes", torch._convert_weight_to_int4pack(pairs, INNER_TILES))

    def forward(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        if self.on_cpu:
            found = torch._weight_int4pack_mm_for_cpu(x, self.codes, GROUP, self.parts)  # type: ignore[arg-type]
        else:
            found = torch._weight_int4pack_mm(x.to(torch.bfloat16), self.codes, GROUP, self.parts).to(x.dtype)  # type: ignore[arg-type]
        return found if self.bias is None else found + self.bias  # type: ignore[operator]


def torchao_linear(weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> nn.Module:
    """Weight-only int4 of torchao."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = _plain(weight.to(torch.bfloat16), bias)
    quantize_(layer, Int4WeightOnlyConfig(group_size=GROUP))
    return layer


def gemlite_linear(weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> nn.Module:
    """Weight-only int4 of gemlite."""
    from gemlite.helper import A16Wn

    codes, scale = int4_codes(weight)
    zeros = torch.full_like(scale, 8.0)
    made: nn.Module = A16Wn(device=str(weight.device)).from_weights(
        codes.to(torch.uint8), scale.to(weight.dtype), zeros.to(weight.dtype), 4, GROUP, bias
    )
    return made


def int4_codes(
    weight: Float[Tensor, "out in"], group: int = GROUP
) -> tuple[Int[Tensor, "out in"], Float[Tensor, "out groups"]]:
    """Symmetric codes from 0 to 15, 8 for zero, and the scales of their groups.

    Raises:
        ValueError: the columns are no multiple of the group.
    """
    rows, columns = weight.shape
    if columns % group:
        raise ValueError(f"{columns} columns are no multiple of a group of {group}")
    grouped = weight.detach().float().view(rows, columns // group, group)
    scale = (grouped.abs().amax(2) / 7).clamp_min(1e-12)
    codes = torch.round(grouped / scale[..., None]).clamp(-8, 7) + 8
    return codes.view(rows, columns).to(torch.int32), scale


def _plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return layer
