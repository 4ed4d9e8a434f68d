"""What torch itself offers on a CPU for the storages that ``cpu.py`` times, put together by hand."""

from __future__ import annotations

import warnings
from copy import deepcopy

import torch
from torch import Tensor, nn

from ffsplit.ffn.sum import SumFFN
from ffsplit.kernels.cpu_int4 import Int4Matrix, int4_linear, int4_matrix


def torchs_own(dense: SumFFN, int4: SumFFN) -> dict[str, nn.Module]:
    """What torch offers for the same storages, put together by hand."""
    branch, coded = dense.branches[0], int4.branches[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what torch has
        plain = PlainFFN(branch.act, *(_module(branch, name) for name in ("up", "gate", "down")))
        dynamic = torch.ao.quantization.quantize_dynamic(deepcopy(plain), {nn.Linear}, dtype=torch.qint8)
    return {
        "torch int4 kernel, bf16": PlainFFN(
            branch.act,
            *(
                None if getattr(coded, name) is None else Int4Linear(int4_matrix(getattr(coded, name).stored().int4()))
                for name in ("up", "gate", "down")
            ),
        ),
        "torch int8 kernel (weights only), bf16": PlainFFN(
            branch.act,
            *(
                None if getattr(branch, name) is None else Int8Linear(getattr(branch, name).weight)
                for name in ("up", "gate", "down")
            ),
        ),
        "torch quantize_dynamic int8, fp32": dynamic,
    }


class PlainFFN(nn.Module):
    """An FFN of any linear layers, as a model would write it; a plain one with biases, a gated one without."""

    def __init__(self, act: nn.Module, up: nn.Module, gate: nn.Module | None, down: nn.Module) -> None:
        super().__init__()
        self.act, self.up, self.gate, self.down = act, up, gate, down
        self.biases: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(self.act(self.gate(x)) * self.up(x))
        hidden = self.up(x)
        if self.biases is None:
            self.biases = hidden.new_zeros(hidden.shape[-1]), x.new_zeros(x.shape[-1])
        return self.down(self.act(hidden + self.biases[0])) + self.biases[1]


class Int4Linear(nn.Module):
    """torch's int4 kernel and nothing else."""

    def __init__(self, matrix: Int4Matrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        return int4_linear(x, self.matrix)


class Int8Linear(nn.Module):
    """torch's weight-only int8 kernel, a scale a row."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = weight.float().abs().amax(1) / 127
        self.codes = (weight.float() / scale[:, None]).round().to(torch.int8)
        self.scale = scale.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scale)


def _module(branch: nn.Module, name: str) -> nn.Module | None:
    projection = getattr(branch, name)
    if projection is None:
        return None
    layer = nn.Linear(*reversed(projection.weight.shape), bias=False)
    layer.weight = nn.Parameter(projection.weight.float(), requires_grad=False)
    return layer
