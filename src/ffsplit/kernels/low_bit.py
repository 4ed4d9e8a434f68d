"""The whole FFN over packed codes in two or three launches on NVIDIA GPUs, for few tokens; see ``cuda/low_bit.cu``.

Weights are read in the form in which they are stored, so nothing is kept beside them. Numbers are those of the plain
path up to the rounding of halves: codes become exact halves, products are summed in float32, scales are applied to the
sums of their groups. In bfloat16 inputs and hidden activations beyond 2^71 become Inf, those below 2^-49 lose digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ffsplit.kernels import nvrtc
from ffsplit.kernels.activations import ACTIVATIONS, NAMES
from ffsplit.kernels.dense_ffn import DenseFFN
from ffsplit.kernels.packed import PackedTensors

MOST_TOKENS = 32
"""Beyond, multiplying by decoded weights is faster."""
DENSE_BITS = 16
"""Of a dense matrix of halves."""
BITS = (2, 3, 4, 8, DENSE_BITS)
GROUPS = (32, 64, 128)
TILE = 16
"""Rows of one product; :data:`TOKENS` tokens stand beside them."""
TOKENS = 8
ENOUGH = 128
"""Blocks that find work for about all multiprocessors of a large GPU."""
BRANCH_TENSORS = 14
ALIGNMENT = 16
"""Bytes that a thread reads at once: inputs and matrices start at a multiple of them."""
LARGEST = 2**32
"""Bytes of a matrix that the sources can count."""
WARPS = 4
"""Of a block that puts tokens in order, each of them a group of a tile."""


@dataclass(frozen=True)
class LowBitShape:
    """What must be known of an FFN of one or two branches before its kernels are compiled.

    Attributes:
        d_model: width of inputs and outputs.
        neurons: of each branch, heavy first.
        bits: of each branch.
        group: consecutive columns that share a scale, in all packed matrices.
        gated: whether there is a gate.
        act: one of :data:`ffsplit.kernels.activations.ACTIVATIONS`.
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
        known = all(bits in BITS for bits in self.bits) and max(self.neurons) * self.d_model * 2 < LARGEST
        return known and not narrow and all(size > 0 and size % step == 0 for size in (self.d_model, *self.neurons))

    def padded(self, size: int) -> int:
        """So many columns filled up to whole groups."""
        return -(-size // self.group) * self.group

    @property
    def orders(self) -> int:
        """In how many orders inputs are read: branches of different bits have their own."""
        return len(set(self.bits))

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


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if it does not start where :data:`ALIGNMENT` bytes may be read at once."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def takes(x: Float[Tensor, "*tokens d_model"], shapes: Sequence[LowBitShape]) -> bool:
    """Whether the kernels are right for these inputs and, for so few tokens, faster than decoded weights."""
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16) or not x.numel():
        return False
    if x.shape[-1] != shapes[0].d_model:  # the plain path says what is wrong
        return False
    if x.numel() // shapes[0].d_model > MOST_TOKENS:
        return False
    return all(shape.is_supported for shape in shapes) and nvrtc.is_supported(x.device.index or 0)


@dataclass(frozen=True)
class Block:
    """What a block of threads of a kernel does.

    Attributes:
        warps: of all rows together; those at the same rows share the groups.
        across: warps at different rows that share tokens.
        tall: rows of a warp, in units of :data:`TILE`.
        shared: bytes of shared memory of a warp.
        resident: warps that must find room for their registers on a multiprocessor.
    """

    warps: int
    across: int
    tall: int
    shared: int
    resident: int = 16

    @property
    def rows(self) -> int:
        """Of the block."""
        return TILE * self.tall * self.across

    def within(self, room: int) -> Block:
        """The same with as many warps as find their memory in so many bytes."""
        teams = self.warps // self.across
        while teams > 1 and teams * self.across * self.shared > room:
            teams //= 2
        return replace(self, warps=teams * self.across)


@dataclass(frozen=True)
class Layout:
    """How much a block of threads of each kernel does; the fastest that were measured on an H200.

    Attributes:
        tiles: of :data:`TOKENS` tokens, in both kernels. More than one are put in order by a launch in front.
        inner: a block of the kernel of that name.
        outer: likewise.
    """

    tiles: int
    inner: Block
    outer: Block

    @classmethod
    def of(cls, tokens: int, shape: LowBitShape, room: int) -> Layout:
        """The layout for so many tokens on a device whose blocks have at most ``room`` bytes of shared memory."""
        tiles = 1 if tokens <= TOKENS else 2 if tokens <= 2 * TOKENS else 4
        return cls(tiles, _inner(tiles, shape).within(room), _outer(tiles, shape.d_model).within(room))

    def blocks(self, tokens: int) -> int:
        """Of all tiles of tokens, each of them read whole."""
        return -(-tokens // (TOKENS * self.tiles))


def _inner(tiles: int, shape: LowBitShape) -> Block:
    """Taller blocks share tokens among more rows, but there are fewer of them, and of two branches they differ more."""
    neurons, one = sum(shape.neurons), len(shape.neurons) == 1
    many, most = neurons >= 4 * ENOUGH * TILE, neurons >= 8 * ENOUGH * TILE
    tall = 1 if shape.gated else 2
    if tiles == 4:
        return Block(4, 2, 1, 12288, 12) if shape.gated else Block(4, 2, 2, 18432, 8)
    if tiles == 2:
        if shape.gated and (most or (many and one)):
            return Block(4, 2, 1, 12288, 12) if one else Block(4, 2, 1, 8192)
        return Block(8, 2, tall, 12288)
    if shape.gated and (most or (many and one)):
        return Block(4, 1, 2, 12288, 12)
    return Block(4 if many else 8, 1, tall, 8192, 20)


def _outer(tiles: int, d_model: int) -> Block:
    """Many rows are for blocks that share tokens among them; few go to as many blocks as there can be."""
    if d_model < 2 * ENOUGH * TILE:
        return Block(8, 1, 1, 20480) if tiles == 4 else Block(16, 1, 1, 12288)
    if d_model < 4 * ENOUGH * TILE:
        return Block(12, 1, 2, 16384, 12) if tiles == 2 else Block(16, 2, 1, 8192 if tiles == 1 else 12288)
    return Block(16, 2, 2, 12288) if tiles == 1 else Block(12, 2, 2, 12288, 12)


class LowBitFFN:
    """Two launches over fixed weights (three for more than a tile of tokens), all but the tokens' addresses made ready.

    Args:
        tensors: for each branch, heavy first: codes, scales, zeros and row scales of gate, up and down (None for what
            is not there; a dense matrix is codes only), then the biases of gate and up; at the end the bias of the sum.
            Codes as :func:`ffsplit.ops.packing.pack` makes them, scales as bits of float16 numbers (int16) or, with
            row scales, as multiples (uint8) of a 256th of them. They are read at every call and not held.
        shape: of the FFN.
        tokens: for how many, about; the kernels' layout depends on it.
        dtype: of inputs, outputs and all floating-point tensors.
        device: index of the GPU.
        layout: of the blocks of threads; None for that of :meth:`Layout.of`.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        shape: LowBitShape,
        tokens: int,
        dtype: torch.dtype,
        device: int,
        layout: Layout | None = None,
    ) -> None:
        layout = layout or Layout.of(tokens, shape, nvrtc.shared_memory(device))
        self.shape, self.layout, self.dtype = shape, layout, dtype
        heavy_bits, rest_bits = (0, *shape.bits)[-2:]
        heavy, rest = (0, *shape.neurons)[-2:]
        half, act = dtype == torch.float16, NAMES.index(shape.act)
        storages = heavy_bits, rest_bits, shape.group, layout.tiles
        inner = *storages, act, shape.gated, half, *astuple(layout.inner)
        outer = *storages, half, *astuple(layout.outer)
        # Few tokens are put in order where they are read.
        self.arrange = None
        if layout.tiles > 1:
            self.arrange = nvrtc.launcher("low_bit", "arrange", (heavy_bits, rest_bits, shape.group, half), device)
        self.inner = nvrtc.launcher("low_bit", "inner", inner, device, layout.inner.warps * layout.inner.shared)
        self.outer = nvrtc.launcher("low_bit", "outer", outer, device, layout.outer.warps * layout.outer.shared)
        nothing = [None] * BRANCH_TENSORS * (2 - len(shape.neurons))
        parts = nvrtc.addresses((*nothing, *tensors))
        branches = [parts[at : at + BRANCH_TENSORS] for at in (0, BRANCH_TENSORS)]
        # Of each branch: gate 0-3, up 4-7, down 8-11, biases of gate 12 and up 13.
        self._inner_weights = [part for b in branches for part in (*b[0:4], b[12], *b[4:8], b[13])]
        self._outer_weights = [part for b in branches for part in b[8:12]]
        self._bias, self._sizes = parts[-1], (heavy, rest, shape.d_model)
        self._inner_grid = sum(-(-size // layout.inner.rows) for size in (heavy, rest))
        self._outer_grid = -(-shape.d_model // layout.outer.rows)

    @property
    def is_compiled(self) -> bool:
        in_order = self.layout.tiles == 1 or self.arrange is not None
        return in_order and self.inner is not None and self.outer is not None

    def __call__(self, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens d_model"]:
        """The outputs."""
        assert self.inner is not None
        assert self.outer is not None
        shape, layout = self.shape, self.layout
        flat = aligned(x.reshape(-1, shape.d_model).contiguous())
        count = flat.shape[0]
        blocks = layout.blocks(count)
        rows = blocks * layout.tiles * TOKENS
        hidden = flat.new_empty(rows * sum(shape.padded(size) for size in shape.neurons))
        out, read, sums = torch.empty_like(flat), flat, flat
        if self.arrange is not None:
            size = rows * shape.padded(shape.d_model)
            read = flat.new_empty(size * shape.orders)
            sums = torch.empty(size // shape.group, dtype=torch.float32, device=flat.device)
            grid = -(-size // (TOKENS * shape.group * WARPS)), 1
            pointers = [flat.data_ptr(), read.data_ptr(), sums.data_ptr()]
            self.arrange(grid, 32 * WARPS, pointers, [count, shape.d_model], early=True)
        self.inner(
            (self._inner_grid, blocks),
            32 * layout.inner.warps,
            [read.data_ptr(), sums.data_ptr(), hidden.data_ptr(), *self._inner_weights],
            [count, *self._sizes],
            early=True,
        )
        self.outer(
            (self._outer_grid, blocks),
            32 * layout.outer.warps,
            [hidden.data_ptr(), out.data_ptr(), self._bias, *self._outer_weights],
            [count, *self._sizes],
            early=True,
        )
        return out.view(x.shape)


def decoded(
    x: Float[Tensor, "*tokens d_model"], tensors: Sequence[Tensor | None], shape: LowBitShape
) -> Float[Tensor, "*tokens d_model"]:
    """The same outputs by decoded weights, anywhere; ``tensors`` as :class:`LowBitFFN` takes them."""

    def matrix(parts: Sequence[Tensor | None], bits: int, columns: int) -> Tensor:
        codes, scale, zero, row_scale = parts
        assert codes is not None
        if bits == DENSE_BITS:
            return codes
        assert scale is not None
        stored = PackedTensors(codes, scale, zero, row_scale, None, bits=bits, group=shape.group, columns=columns)
        return stored.dense(x.dtype)

    total: Tensor | None = None
    for at, (neurons, bits) in enumerate(zip(shape.neurons, shape.bits, strict=True)):
        part = tensors[at * BRANCH_TENSORS : (at + 1) * BRANCH_TENSORS]
        inner = [matrix(part[4:8], bits, shape.d_model)]
        inner += [matrix(part[0:4], bits, shape.d_model)] if shape.gated else []
        bias = None if at else tensors[-1]
        ffn = DenseFFN(torch.cat(inner), matrix(part[8:12], bits, neurons), part[13], part[12], bias, shape.act)
        total = ffn(x) if total is None else total + ffn(x)
    assert total is not None
    return total


# The schema in words: under a runtime type checker it could not be read off the function.
@torch.library.custom_op(
    "ffsplit::low_bit_ffn", mutates_args=(), schema="(Tensor x, Tensor?[] tensors, int[] numbers) -> Tensor"
)
def low_bit_ffn(x: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> Tensor:
    """What :class:`LowBitFFN` does, as an operator that compilers see; ``numbers`` are those of the shape.

    A compiled graph cannot change its mind: where the kernels cannot be compiled, weights are decoded at every call.
    """
    shape = LowBitShape.from_numbers(numbers)
    found = [None if tensor is None else aligned(tensor) for tensor in tensors]
    ffn = LowBitFFN(found, shape, x.numel() // shape.d_model, x.dtype, x.device.index)
    return ffn(x) if ffn.is_compiled else decoded(x, tensors, shape)


@low_bit_ffn.register_fake
def _(x: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
