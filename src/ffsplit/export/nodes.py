"""Modules that become the nodes of an ONNX graph which torch has no operation for, while a model is traced.

Outside of a trace they return zeros: what is exported is checked in ONNX Runtime, never by running these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn.functional import linear

from ffsplit.export.blocks import BlockCodes
from ffsplit.kernels import cpu
from ffsplit.kernels.int8 import LARGEST

ROUNDED_INPUTS = 4
"""``accuracy_level`` of MatMulNBits: inputs are rounded to int8 in blocks, which its fast kernels want."""
ZERO = 128
"""Of int8 numbers stored as uint8. Inputs always are: kernels of unsigned inputs and signed weights are fast."""
_SMALLEST = torch.finfo(torch.float32).tiny


class Node(nn.Module):
    """``x W^T`` as one node, or a few around one. Nodes of equal ``key`` can read the same input in one.

    Attributes:
        key: what has to be equal for that.
        rows: outputs.
        worth: how many such nodes have to come together before one is faster than they are: its output has to be cut
            up, which copies it.
    """

    key: tuple[object, ...]
    rows: int
    worth: int = 2

    def stacked(self, others: Sequence[Node]) -> Node:
        """One node with the outputs of this one and then those of the others, all of the same key."""
        raise TypeError(f"{type(self).__name__} stands alone")


AnyNode = TypeVar("AnyNode", bound=Node)


class Plain(Node):
    """A float matrix."""

    worth = 3
    weight: Tensor

    def __init__(self, weight: Float[Tensor, "out in"]) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().float())
        self.key = ("plain",)
        self.rows = weight.shape[0]

    def stacked(self, others: Sequence[Node]) -> Plain:
        return Plain(torch.cat([node.weight for node in _alike(self, others)]))

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return linear(x, self.weight)


class NBits(Node):
    """MatMulNBits of ONNX Runtime (domain ``com.microsoft``) on our codes, scales and zeros."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    inputs: Tensor | None

    def __init__(self, stored: BlockCodes, inputs: Float[Tensor, " in"] | None = None) -> None:
        super().__init__()
        self.stored = stored
        self.register_buffer("codes", stored.codes)
        self.register_buffer("scale", stored.scale)
        self.register_buffer("zero", stored.zero)
        self.register_buffer("inputs", inputs)
        factors = None if inputs is None else tuple(inputs.tolist())
        self.key = ("n_bits", stored.bits, stored.block, stored.zero is None, factors)
        self.rows = stored.codes.shape[0]

    def stacked(self, others: Sequence[Node]) -> NBits:
        return NBits(BlockCodes.stacked([node.stored for node in _alike(self, others)]), self.inputs)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        stored = self.stored
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            [
                x if self.inputs is None else x * self.inputs,
                self.codes,
                self.scale,
                *([] if self.zero is None else [self.zero]),
            ],
            {
                "K": stored.columns,
                "N": self.rows,
                "bits": stored.bits,
                "block_size": stored.block,
                "accuracy_level": ROUNDED_INPUTS,
            },
            dtype=x.dtype,
            shape=[*x.shape[:-1], self.rows],
            version=1,
        )


class RowInt8(Node):
    """Int8 weights times inputs that are rounded to int8 per token, exactly as `ffsplit.kernels.int8` rounds them.

    Where the fast kernels are not exact, weights are written as uint8 too, whose kernels add in 32 bits anywhere.
    Several of one input stay apart: the tracer finds that they round it alike and does so once.
    """

    codes: Tensor
    scale: Tensor
    one: Tensor
    zero: Tensor

    def __init__(self, codes: Int8[Tensor, "out in"], scale: Float[Tensor, " out"]) -> None:
        super().__init__()
        self.unsigned = cpu.SATURATES
        stored = (codes.short() + ZERO).byte() if self.unsigned else codes
        self.register_buffer("codes", stored.T.contiguous())
        self.register_buffer("scale", scale.float())
        self.register_buffer("one", torch.ones((), dtype=torch.float32))
        self.register_buffer("zero", torch.full((), ZERO, dtype=torch.uint8))
        self.key = ("row_int8", id(self))
        self.rows = codes.shape[0]

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        # A token of zeros has zero codes at any scale.
        x_scale = (x.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(_SMALLEST)
        rounded = torch.onnx.ops.symbolic(
            "QuantizeLinear", [x / x_scale, self.one, self.zero], dtype=torch.uint8, shape=x.shape
        )
        found = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulIntegerToFloat",
            [rounded, self.codes, self.one, self.scale, self.zero, *([self.zero] if self.unsigned else [])],
            dtype=x.dtype,
            shape=[*x.shape[:-1], self.rows],
            version=1,
        )
        return found * x_scale


def _alike(first: AnyNode, others: Sequence[Node]) -> list[AnyNode]:
    """All of them, of one class."""
    same = [node for node in others if isinstance(node, type(first)) and node.key == first.key]
    if len(same) != len(others):
        raise TypeError("nodes of different keys cannot be stacked")
    return [first, *same]
