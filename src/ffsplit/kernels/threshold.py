"""FFNs that leave out neurons of small activation, for few tokens on NVIDIA GPUs; see ``cuda/threshold.cu``.

`gate` is read whole, of `up` and `down` only the neurons that work for some token. For that, `down` must lie neuron
after neuron; otherwise it is read whole. Decisions are made on activations rounded as the plain path rounds them; sums
are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import linear

from ffsplit.kernels import nvrtc
from ffsplit.kernels.activations import ACTIVATIONS, NAMES
from ffsplit.kernels.low_bit import ALIGNMENT, aligned

MOST_TOKENS = 2
"""Tokens differ in the neurons that they need: at 4, too few are left out by all for these kernels to pay."""
BRANCH_TENSORS = 5
WARPS = 8
THREADS = 32 * WARPS
"""Of a block. In `inner`, a warp has a neuron; in `outer`, a thread eight of the columns of a slice."""
SLICE = 256
RUN = 8
"""Neurons that go to the same share."""
LEAST_RUNS = 4
"""Of a share: below, adding up what blocks found takes longer than finding it."""
BLOCKS = {1: 4, 2: 2}
"""Of `outer` that a multiprocessor runs at a time, by tokens."""


@dataclass(frozen=True)
class ThresholdShape:
    """What must be known of an FFN before its kernels are compiled.

    Attributes:
        d_model: width of inputs and outputs.
        heavy: neurons that always work.
        rest: neurons under thresholds, at least one.
        gated: whether there is a gate.
        shared: one threshold serves all neurons.
        act: one of :data:`ffsplit.kernels.activations.ACTIVATIONS`.
    """

    d_model: int
    heavy: int
    rest: int
    gated: bool
    shared: bool
    act: str

    @property
    def is_supported(self) -> bool:
        """Whether every row starts where 16 bytes may be read at once, and the activation is known."""
        return self.act in ACTIVATIONS and self.d_model > 0 and self.d_model % (ALIGNMENT // 2) == 0

    @property
    def neurons(self) -> int:
        return self.heavy + self.rest

    def numbers(self) -> list[int]:
        """As integers, for the operator's schema."""
        return [*map(int, astuple(self)[:-1]), NAMES.index(self.act)]

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> ThresholdShape:
        """The inverse of :meth:`numbers`."""
        d_model, heavy, rest, gated, shared, act = numbers
        return cls(d_model, heavy, rest, bool(gated), bool(shared), NAMES[act])


def takes(x: Float[Tensor, "*tokens d_model"], shape: ThresholdShape) -> bool:
    """Whether the kernels are right for these inputs and leave out enough for so few tokens."""
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16) or not x.numel():
        return False
    if x.shape[-1] != shape.d_model or x.numel() > MOST_TOKENS * shape.d_model:
        return False
    return shape.is_supported and nvrtc.is_supported(x.device.index or 0)


@dataclass(frozen=True)
class Workspace:
    """Where what passes between blocks and launches lies in one buffer: bytes from its start.

    Attributes:
        partial: sums of every share, float32; the counters come first.
        hidden: hidden activations.
        size: of the buffer.
    """

    partial: int
    hidden: int
    size: int

    @classmethod
    def of(cls, shape: ThresholdShape, tokens: int, shares: int) -> Workspace:
        slices = -(-shape.d_model // SLICE)
        partial = -(-4 * slices // ALIGNMENT) * ALIGNMENT
        hidden = partial + 4 * shares * tokens * slices * SLICE
        return cls(partial, hidden, hidden + 2 * tokens * shape.neurons)


def shares_of(shape: ThresholdShape, tokens: int, processors: int) -> int:
    """Into how many shares `outer` cuts the neurons: blocks for every place of the GPU, at most."""
    slices, runs = -(-shape.d_model // SLICE), -(-shape.neurons // RUN)
    return max(1, min(processors * BLOCKS[tokens] // slices, runs // LEAST_RUNS))


class ThresholdFFN:
    """Two launches over fixed weights, everything about them but the tokens' addresses made ready.

    Args:
        tensors: of the heavy neurons, then of the rest: gate and its bias, up and its bias, down (None for what is not
            there); then the thresholds and the bias of the sum. ``down`` is ``[neurons, d_model]``. They are read at
            every call and not held.
        shape: of the FFN.
        tokens: for exactly how many.
        dtype: of inputs, outputs and all tensors.
        device: index of the GPU.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        shape: ThresholdShape,
        tokens: int,
        dtype: torch.dtype,
        device: int,
    ) -> None:
        self.shape, self.tokens = shape, tokens
        half, act = dtype == torch.float16, NAMES.index(shape.act)
        self.inner = nvrtc.launcher("threshold", "inner", (act, shape.gated, half, tokens), device)
        self.outer = nvrtc.launcher("threshold", "outer", (half, tokens), device)
        heavy, rest = tensors[:BRANCH_TENSORS], tensors[BRANCH_TENSORS : 2 * BRANCH_TENSORS]
        # What is compared with the threshold comes first: the gate, or `up` without one.
        inner = [tensors[-2], *_compared_first(heavy[:4], shape.gated), *_compared_first(rest[:4], shape.gated)]
        self._inner_weights = nvrtc.addresses(inner)
        self._outer_weights = nvrtc.addresses([heavy[4], rest[4], tensors[-1]])
        self._shares = shares_of(shape, tokens, nvrtc.processors(device))
        self._space = Workspace.of(shape, tokens, self._shares)

    @property
    def is_compiled(self) -> bool:
        return self.inner is not None and self.outer is not None

    def __call__(self, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens d_model"]:
        """The outputs."""
        assert self.outer is not None
        shape, space = self.shape, self._space
        buffer = self._inner(x)
        arrived = buffer.data_ptr()
        out = x.new_empty(x.shape)
        self.outer(
            (-(-shape.d_model // SLICE), self._shares),
            THREADS,
            [arrived + space.hidden, *self._outer_weights, arrived + space.partial, arrived, out.data_ptr()],
            [shape.heavy, shape.rest, shape.d_model],
        )
        return out

    def hidden(self, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "count neurons"]:
        """The hidden activations, heavy neurons first, zero for those that are left out."""
        buffer = self._inner(x)
        return buffer[self._space.hidden :].view(x.dtype).view(self.tokens, self.shape.neurons)

    def _inner(self, x: Tensor) -> UInt8[Tensor, " size"]:
        """The workspace, filled by the first launch."""
        assert self.inner is not None
        shape, space = self.shape, self._space
        flat = aligned(x.reshape(-1, shape.d_model).contiguous())
        buffer = flat.new_empty(space.size, dtype=torch.uint8)
        start = buffer.data_ptr()
        self.inner(
            (-(-shape.neurons // WARPS), 1),
            THREADS,
            [flat.data_ptr(), start + space.hidden, start, *self._inner_weights],
            [shape.heavy, shape.rest, shape.d_model, int(shape.shared)],
        )
        return buffer


def _compared_first(tensors: Sequence[Tensor | None], gated: bool) -> list[Tensor | None]:
    gate, gate_bias, up, up_bias = tensors
    return [gate, gate_bias, up, up_bias] if gated else [up, up_bias, None, None]


@torch.library.custom_op(
    "ffsplit::threshold_ffn", mutates_args=(), schema="(Tensor x, Tensor?[] tensors, int[] numbers) -> Tensor"
)
def threshold_ffn(x: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> Tensor:
    """What :class:`ThresholdFFN` does, as an operator that compilers see.

    A compiled graph cannot change its mind: where the kernels cannot be compiled, activations are computed and masked.

    Args:
        x: inputs.
        tensors: as there, but ``down`` as it is stored, ``[d_model, neurons]``: read whole, unless its memory lies
            neuron after neuron.
        numbers: of the shape.
    """
    shape = ThresholdShape.from_numbers(numbers)
    found = [None if tensor is None else aligned(tensor) for tensor in tensors]
    places = [at for at in (BRANCH_TENSORS - 1, 2 * BRANCH_TENSORS - 1) if found[at] is not None]
    downs = [down for at in places if (down := found[at]) is not None]
    sparse = all(down.t().is_contiguous() for down in downs)
    for at, down in zip(places, downs, strict=True):
        found[at] = down.t()
    tokens = x.numel() // shape.d_model
    ffn = ThresholdFFN(found, shape, tokens, x.dtype, x.device.index or 0)
    if sparse and ffn.is_compiled:
        return ffn(x)
    hidden = ffn.hidden(x) if ffn.is_compiled else masked_hidden(x, tensors, shape)
    return _times_down(hidden, downs, tensors[-1]).view(x.shape)


@threshold_ffn.register_fake
def _(x: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def masked_hidden(
    x: Float[Tensor, "*tokens d_model"], tensors: Sequence[Tensor | None], shape: ThresholdShape
) -> Float[Tensor, "count neurons"]:
    """What :meth:`ThresholdFFN.hidden` gives, anywhere: activations that a threshold leaves out become zero."""
    flat, act, threshold = x.reshape(-1, shape.d_model), ACTIVATIONS[shape.act], tensors[-2]
    assert threshold is not None
    parts = []
    for at in (0, BRANCH_TENSORS):
        gate, gate_bias, up, up_bias, _ = tensors[at : at + BRANCH_TENSORS]
        if up is None:  # there are no heavy neurons
            continue
        value = linear(flat, up, up_bias)
        activation = act(value) if gate is None else act(linear(flat, gate, gate_bias))
        if at:
            activation = torch.where(activation.abs() > threshold, activation, torch.zeros_like(activation))
        parts.append(activation if gate is None else activation * value)
    return torch.cat(parts, 1)


def _times_down(hidden: Tensor, downs: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """All of ``down``, for hidden activations of the branches side by side."""
    parts = torch.split(hidden, [down.shape[1] for down in downs], 1)
    total = linear(parts[0], downs[0], bias)
    return total if len(downs) == 1 else total + linear(parts[1], downs[1])
