"""One made-up FFN with inputs, for tests of methods that leave out work at run time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ffsplit.calibrate.cache import Activations, TensorCache
from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.sum import Branch, SumFFN
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods.registry import get_method, method_config

D_MODEL, D_FF = 12, 40


def layer(
    *, gated: bool = True, biased: bool = False, act: nn.Module | None = None, tokens: int = 2000, seed: int = 0
) -> LayerData:
    """Neurons of very different sizes, inputs with a mean and unequal channels, sequences of unequal length."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    sizes = torch.logspace(-1, 1, D_FF)[torch.randperm(D_FF, generator=generator)]
    ffn = FFNWeights(
        up=random(D_FF, D_MODEL) / D_MODEL**0.5,
        down=random(D_MODEL, D_FF) * sizes,
        act=act or nn.SiLU(),
        gate=random(D_FF, D_MODEL) / D_MODEL**0.5 if gated else None,
        up_bias=random(D_FF) if biased else None,
        gate_bias=random(D_FF) if biased and gated else None,
        down_bias=random(D_MODEL) if biased else None,
    )
    inputs = Activations(TensorCache(), "x")
    drawn = random(tokens, D_MODEL) * torch.logspace(-0.5, 0.5, D_MODEL) + random(D_MODEL) * 0.3
    for chunk in drawn.split([tokens // 3, tokens - tokens // 3]):
        inputs.append(chunk)
    return LayerData(ffn, inputs, "made-up", 3)


def fitted(data: LayerData, name: str, **settings: Any) -> SumFFN:
    """What a method makes of the layer."""
    config = method_config({"method": name, **settings})
    with torch.no_grad():
        return get_method(name).apply(data, config).requires_grad_(False)


def tokens_of(data: LayerData) -> Tensor:
    return torch.cat(list(data.inputs))


def branches(module: SumFFN) -> list[Branch]:
    return [branch for branch in module.branches if isinstance(branch, Branch)]


def error(data: LayerData, module: SumFFN) -> float:
    """Relative error of the outputs on the calibration inputs."""
    x = tokens_of(data)
    wanted = data.ffn(x)
    return float((module(x) - wanted).norm() / wanted.norm())


def working(module: SumFFN, x: Tensor) -> Tensor:
    """Which neurons of the masked branch, the last one, give anything for which token."""
    return branches(module)[-1].hidden(x) != 0
