"""Made-up numbers for a structure: enough to time it, and of a size that keeps outputs finite."""

from __future__ import annotations

import torch
from torch import nn

from ffsplit.ffn.projections import Int8Dynamic, Packed
from ffsplit.kernels.int8 import LARGEST
from ffsplit.ops.packing import pack

STANDARD_DEVIATION = 0.02


@torch.no_grad()
def fill(module: nn.Module, seed: int = 0) -> None:
    """Random numbers in every tensor that was never written: it may hold NaN, which some processors multiply slowly.

    Floating-point tensors become normal with standard deviation 0.02, codes uniform with scales that give
    weights of that size; other integers zero.

    Args:
        module: changed in place; on one device.
        seed: of that device's generator.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if not tensors:
        return
    generator = torch.Generator(tensors[0].device).manual_seed(seed)
    for tensor in tensors:
        if tensor.is_floating_point():
            drawn = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
            tensor.copy_(drawn.normal_(0.0, STANDARD_DEVIATION, generator=generator))
        else:
            tensor.zero_()
    for part in module.modules():
        if isinstance(part, Packed):
            _fill_packed(part, generator)
        elif isinstance(part, Int8Dynamic):
            part.codes.random_(-LARGEST, LARGEST + 1, generator=generator)
            part.row_scale.fill_(STANDARD_DEVIATION * 3**0.5 / LARGEST)


def _fill_packed(packed: Packed, generator: torch.Generator) -> None:
    packed.codes.random_(0, 256, generator=generator)
    # Uniform codes of b bits have a standard deviation of 2^b / sqrt(12).
    step = STANDARD_DEVIATION * 12**0.5 / 2**packed.spec.bits
    if packed.row_scale is None:
        packed.scale.view(torch.float16).fill_(step)
    else:  # the groups' scales are uniform up to the row's largest
        packed.scale.random_(0, 256, generator=generator)
        packed.row_scale.view(torch.float16).fill_(2 * step)
    if packed.zero is not None:
        middle = torch.full_like(packed.scale, 2 ** (packed.spec.bits - 1), dtype=torch.uint8)
        packed.zero.copy_(pack(middle.flatten(), packed.spec.bits))
    if packed.input_scale is not None:
        packed.input_scale.view(torch.float16).fill_(1.0)
