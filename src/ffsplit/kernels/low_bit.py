"""The whole FFN over packed codes in two launches on NVIDIA GPUs, for few tokens; see ``cuda/low_bit.cu``.

Weights are read in the form in which they are stored, so nothing is kept beside them. Numbers are those of the plain
path up to the rounding of halves: codes become exact halves, products are summed in float32, scales are applied to the
sums of their groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ffsplit.kernels import nvrtc

MOST_TOKENS = 64
"""Beyond, multiplying by decoded weights is faster."""
BITS = (2, 3, 4, 8, 16)
"""16 is a dense matrix of halves."""
GROUPS = (32, 64, 128)
TILE = 16
"""Rows that a block of threads works on; :data:`TOKENS` tokens stand beside them."""
TOKENS = 8
ACTIVATIONS = ("identity", "silu", "gelu", "gelu_tanh", "relu", "relu_squared")


@dataclass(frozen=True)
class LowBitShape:
    """What must be known of an FFN of one or two branches before its kernels are compiled.

    Attributes:
        d_model: width of inputs and outputs.
        neurons: of each branch, heavy first.
        bits: of each branch.
        group: consecutive columns that share a scale, in all packed matrices.
        gated: whether there is a gate.
        act: one of :data:`ACTIVATIONS`.
    """

    d_model: int
    neurons: tuple[int, ...]
    bits: tuple[int, ...]
    group: int
    gated: bool
    act: str

    @property
    def is_supported(self) -> bool:
        """Whether the kernels read these matrices: known widths, rows that start where 16 bytes may be read at once."""
        if self.group not in GROUPS or self.act not in ACTIVATIONS or not 1 <= len(self.neurons) <= 2:
            return False
        # A row of 3-bit codes is two planes, each of which must keep the alignment.
        step = max(64 if 3 in self.bits else 32, self.group // 4)
        narrow = self.group == 32 and any(bits < 4 for bits in self.bits)
        known = all(bits in BITS for bits in self.bits)
        return known and not narrow and all(size > 0 and size % step == 0 for size in (self.d_model, *self.neurons))

    @property
    def padded(self) -> int:
        """Neurons of all branches, each filled up to whole groups."""
        return sum(-(-size // self.group) * self.group for size in self.neurons)

    def numbers(self) -> list[int]:
        """As integers, for the operator's schema."""
        act = ACTIVATIONS.index(self.act)
        return [self.d_model, self.group, int(self.gated), act, *self.neurons, *self.bits]

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> LowBitShape:
        """The inverse of :meth:`numbers`."""
        d_model, group, gated, act, *rest = numbers
        half = len(rest) // 2
        return cls(d_model, tuple(rest[:half]), tuple(rest[half:]), group, bool(gated), ACTIVATIONS[act])


def takes(x: Float[Tensor, "*tokens d_model"], shape: LowBitShape) -> bool:
    """Whether the kernels are right for these inputs and, for so few tokens, faster than the plain path."""
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16) or not x.numel():
        return False
    few = x.numel() // shape.d_model <= MOST_TOKENS
    return few and shape.is_supported and nvrtc.is_supported(x.device.index or 0)


def low_bit_ffn(x: Float[Tensor, "*tokens d_model"], tensors: list[Tensor | None], shape: LowBitShape) -> Tensor | None:
    """The outputs, or None where the kernels cannot be compiled.

    Args:
        x: bfloat16 or float16, on an NVIDIA GPU; see :func:`takes`.
        tensors: for each branch, heavy first: codes, scales, zeros and row scales of gate, up and down (None for what
            is not there; a dense matrix is codes only), then the biases of gate and up; at the end the bias of the sum.
            Codes as :func:`ffsplit.ops.packing.pack` makes them, scales as bits of float16 numbers (int16) or, with
            row scales, as multiples (uint8) of a 256th of them.
        shape: of the FFN.
    """
    if torch.compiler.is_compiling():
        found: Tensor = torch.ops.ffsplit.low_bit_ffn(x, tensors, shape.numbers())
        return found
    return _launch(x, tensors, shape)


def _launch(x: Tensor, tensors: Sequence[Tensor | None], shape: LowBitShape) -> Tensor | None:
    flat = x.reshape(-1, shape.d_model).contiguous()
    count, tiles = flat.shape[0], _tiles(flat.shape[0])
    half, device = str(x.dtype == torch.float16).lower(), x.device.index or 0
    heavy_bits, rest_bits = (0, *shape.bits)[-2:]
    heavy, rest = (0, *shape.neurons)[-2:]
    gated = str(shape.gated).lower()
    types = f"{heavy_bits},{rest_bits},{shape.group},{tiles}"
    narrow, wide = _warps(tiles)
    inner = nvrtc.kernel("low_bit", f"inner<{types},{ACTIVATIONS.index(shape.act)},{gated},{half},{narrow}>", device)
    outer = nvrtc.kernel("low_bit", f"outer<{types},{half},{wide}>", device)
    if inner is None or outer is None:
        return None
    # The last tiles may be read beyond the tokens, never used.
    hidden = flat.new_empty((-(-count // TOKENS) + tiles) * TOKENS * shape.padded)
    out = torch.empty_like(flat)
    nothing = flat.new_empty(0)
    parts: list[Tensor] = [nothing if part is None else part for part in tensors]
    branches = [[nothing] * 14] * (2 - len(shape.neurons)) + [
        parts[at : at + 14] for at in range(0, len(parts) - 1, 14)
    ]
    blocks = -(-count // (TOKENS * tiles))
    # Of each branch: gate 0-3, up 4-7, down 8-11, biases of gate 12 and up 13.
    inputs = [part for b in branches for part in (*b[0:4], b[12], *b[4:8], b[13])]
    sizes = [count, heavy, rest, shape.d_model]
    grid = -(-heavy // TILE) + -(-rest // TILE)
    inner(grid=(grid, blocks, 1), block=(32 * narrow, 1, 1), args=[flat, hidden, *inputs, *sizes])
    downs = [part for b in branches for part in b[8:12]]
    outer(
        grid=(-(-shape.d_model // TILE), blocks, 1),
        block=(32 * wide, 1, 1),
        args=[hidden, out, parts[-1], *downs, *sizes],
    )
    return out.view(x.shape)


def _tiles(tokens: int) -> int:
    """Tiles of eight tokens that a block of threads works on."""
    return 1 if tokens <= TOKENS else 2 if tokens <= 2 * TOKENS else 4 if tokens <= 4 * TOKENS else 8


def _warps(tiles: int) -> tuple[int, int]:
    """Warps that share the groups of a row, of `inner` and of `outer`: the fastest measured on an H100."""
    return (8 if tiles == 1 else 4), (4 if tiles == 8 else 8)


@torch.library.custom_op("ffsplit::low_bit_ffn", mutates_args=())
def _operator(x: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> Tensor:
    found = _launch(x, tensors, LowBitShape.from_numbers(numbers))
    if found is None:
        raise RuntimeError("the kernels of ffsplit::low_bit_ffn cannot be compiled here")
    return found


@_operator.register_fake
def _(x: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
