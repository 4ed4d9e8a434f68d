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
from ffsplit.kernels.dense_ffn import ACTIVATIONS

MOST_TOKENS = 32
"""Beyond, multiplying by decoded weights is faster."""
MOST_ON_FAST_MEMORY = 16
"""The same for two branches where memory is as fast as an H200's: 17 tokens cost what 32 do, and dense gains by it."""
BITS = (2, 3, 4, 8, 16)
"""16 is a dense matrix of halves."""
GROUPS = (32, 64, 128)
TILE = 16
"""Rows that a block of threads works on; :data:`TOKENS` tokens stand beside them."""
TOKENS = 8
BRANCH_TENSORS = 14
ALIGNMENT = 16
"""Bytes that a thread reads at once: inputs and matrices start at a multiple of them."""
NAMES = tuple(ACTIVATIONS)
"""Of activations, in the order in which the sources count them."""


@dataclass(frozen=True)
class LowBitShape:
    """What must be known of an FFN of one or two branches before its kernels are compiled.

    Attributes:
        d_model: width of inputs and outputs.
        neurons: of each branch, heavy first.
        bits: of each branch.
        group: consecutive columns that share a scale, in all packed matrices.
        gated: whether there is a gate.
        act: one of :data:`ffsplit.kernels.dense_ffn.ACTIVATIONS`.
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
        act = NAMES.index(self.act)
        return [self.d_model, self.group, int(self.gated), act, *self.neurons, *self.bits]

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> LowBitShape:
        """The inverse of :meth:`numbers`."""
        d_model, group, gated, act, *rest = numbers
        half = len(rest) // 2
        return cls(d_model, tuple(rest[:half]), tuple(rest[half:]), group, bool(gated), NAMES[act])


def takes(x: Float[Tensor, "*tokens d_model"], shapes: Sequence[LowBitShape]) -> bool:
    """Whether the kernels are right for these inputs and, for so few tokens, faster than decoded weights."""
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16) or not x.numel():
        return False
    if x.shape[-1] != shapes[0].d_model:  # the plain path says what is wrong
        return False
    tokens = x.numel() // shapes[0].d_model
    few = tokens <= MOST_TOKENS and (
        tokens <= MOST_ON_FAST_MEMORY
        or all(len(shape.neurons) == 1 for shape in shapes)
        or not nvrtc.has_fast_memory(x.device.index or 0)
    )
    return few and all(shape.is_supported for shape in shapes) and nvrtc.is_supported(x.device.index or 0)


@dataclass(frozen=True)
class Layout:
    """How much a block of threads of each kernel does; the fastest that was measured on an H100.

    Attributes:
        inner_tiles: tiles of eight tokens of `inner`; its ``inner_warps`` share the groups of the same rows.
        outer_tiles: likewise of `outer`.
    """

    inner_tiles: int
    inner_warps: int
    outer_tiles: int
    outer_warps: int

    @classmethod
    def of(cls, tokens: int, branches: int) -> Layout:
        if tokens <= TOKENS:
            return cls(1, 8, 1, 8)
        # The code of two branches takes more registers, so that fewer blocks run at a time.
        if tokens <= 2 * TOKENS:
            return cls(2, 2, 1, 8) if branches == 1 else cls(2, 4, 2, 8)
        return cls(2, 2, 4, 8) if branches == 1 else cls(4, 4, 4, 8)


class LowBitFFN:
    """Two launches over fixed weights, everything about them but the tokens' addresses made ready.

    Args:
        tensors: for each branch, heavy first: codes, scales, zeros and row scales of gate, up and down (None for what
            is not there; a dense matrix is codes only), then the biases of gate and up; at the end the bias of the sum.
            Codes as :func:`ffsplit.ops.packing.pack` makes them, scales as bits of float16 numbers (int16) or, with
            row scales, as multiples (uint8) of a 256th of them. They are read at every call and not held.
        shape: of the FFN.
        tokens: for how many, about; the kernels' layout depends on it.
        dtype: of inputs, outputs and all floating-point tensors.
        device: index of the GPU.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        shape: LowBitShape,
        tokens: int,
        dtype: torch.dtype,
        device: int,
    ) -> None:
        layout = Layout.of(tokens, len(shape.neurons))
        self.shape, self.layout, self.dtype = shape, layout, dtype
        heavy_bits, rest_bits = (0, *shape.bits)[-2:]
        heavy, rest = (0, *shape.neurons)[-2:]
        half, act = dtype == torch.float16, NAMES.index(shape.act)
        storages = heavy_bits, rest_bits, shape.group
        inner = *storages, layout.inner_tiles, act, shape.gated, half, layout.inner_warps
        outer = *storages, layout.outer_tiles, half, layout.outer_warps
        self.inner = nvrtc.launcher("low_bit", "inner", inner, device)
        self.outer = nvrtc.launcher("low_bit", "outer", outer, device)
        nothing = [None] * BRANCH_TENSORS * (2 - len(shape.neurons))
        parts = [0 if part is None else part.data_ptr() for part in (*nothing, *tensors)]
        branches = [parts[at : at + BRANCH_TENSORS] for at in (0, BRANCH_TENSORS)]
        # Of each branch: gate 0-3, up 4-7, down 8-11, biases of gate 12 and up 13.
        self._inner_weights = [part for b in branches for part in (*b[0:4], b[12], *b[4:8], b[13])]
        self._outer_weights = [part for b in branches for part in b[8:12]]
        self._bias, self._sizes = parts[-1], (heavy, rest, shape.d_model)
        self._inner_grid = -(-heavy // TILE) + -(-rest // TILE)
        self._outer_grid = -(-shape.d_model // TILE)

    @property
    def is_compiled(self) -> bool:
        return self.inner is not None and self.outer is not None

    def __call__(self, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens d_model"]:
        """The outputs."""
        assert self.inner is not None
        assert self.outer is not None
        flat, layout = x.reshape(-1, self.shape.d_model).contiguous(), self.layout
        if flat.data_ptr() % ALIGNMENT:
            flat = flat.clone()
        count = flat.shape[0]
        # The last tiles may be read beyond the tokens; what is found there is not used.
        tiles = -(-count // TOKENS) + max(layout.inner_tiles, layout.outer_tiles)
        hidden = flat.new_empty(tiles * TOKENS * self.shape.padded)
        out = torch.empty_like(flat)
        self.inner(
            (self._inner_grid, -(-count // (TOKENS * layout.inner_tiles))),
            32 * layout.inner_warps,
            [flat.data_ptr(), hidden.data_ptr(), *self._inner_weights],
            [count, *self._sizes],
        )
        self.outer(
            (self._outer_grid, -(-count // (TOKENS * layout.outer_tiles))),
            32 * layout.outer_warps,
            [hidden.data_ptr(), out.data_ptr(), self._bias, *self._outer_weights],
            [count, *self._sizes],
        )
        return out.view(x.shape)


# The schema in words: under a runtime type checker it could not be read off the function.
@torch.library.custom_op(
    "ffsplit::low_bit_ffn", mutates_args=(), schema="(Tensor x, Tensor?[] tensors, int[] numbers) -> Tensor"
)
def low_bit_ffn(x: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> Tensor:
    """What :class:`LowBitFFN` does, as an operator that compilers see; ``numbers`` are those of the shape."""
    shape = LowBitShape.from_numbers(numbers)
    ffn = LowBitFFN(tensors, shape, x.numel() // shape.d_model, x.dtype, x.device.index)
    if not ffn.is_compiled:
        raise RuntimeError("the kernels of ffsplit::low_bit_ffn cannot be compiled here")
    return ffn(x)


@low_bit_ffn.register_fake
def _(x: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
