"""Where a value comes from: a dispatch mode that follows projections' outputs through element-wise code.

The output of a projection starts a *stream*. A stream survives everything that keeps one number per neuron: views of
the leading axes, casts, the two halves of a fused projection, element-wise functions of itself and of constants. It
ends as soon as another activation is mixed in (a residual, a norm, attention); only the product of two streams of the
same input, gate times up, is kept. Values also carry an *identity*, a number that views, copies and casts preserve:
two tensors with the same identity hold the same numbers in the same order. And they carry the *branch* that they are
all of, the latest projection whose output they are made from and nothing else, through norms and anything: a branch
ends where it is added to the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from ffsplit.families.operands import operands

aten = torch.ops.aten

_COPIES = {
    aten._reshape_alias,
    aten._to_copy,
    aten._unsafe_view,
    aten.alias,
    aten.clone,
    aten.contiguous,
    aten.detach,
    aten.expand,
    aten.lift_fresh,
    aten.reshape,
    aten.squeeze,
    aten.to,
    aten.unsqueeze,
    aten.view,
}
_HALVES = {
    aten.chunk,
    aten.narrow,
    aten.slice,
    aten.split,
    aten.split_with_sizes,
    aten.unsafe_chunk,
    aten.unsafe_split,
    aten.unsafe_split_with_sizes,
}
_FACTORIES = {
    aten.empty_like,
    aten.full_like,
    aten.new_empty,
    aten.new_full,
    aten.new_ones,
    aten.new_zeros,
    aten.ones_like,
    aten.zeros_like,
}
_LINEAR = {aten.add, aten.add_, aten.sub, aten.sub_, aten.rsub, aten.neg, aten.neg_}
_PRODUCT = {aten.mul, aten.mul_}
_SUM = {
    aten.add,
    aten.add_,
    aten.addcmul,
    aten.addcmul_,
    aten.index_add,
    aten.index_add_,
    aten.rsub,
    aten.sub,
    aten.sub_,
}
_QUOTIENT = {aten.div, aten.div_}


@dataclass(frozen=True)
class Stream:
    """A value that is an element-wise function of one projection's output.

    Attributes:
        source: path of the projection.
        part: which half of a fused projection, or ``None`` for all of it.
        x: identity of the projection's input.
        nonlinear: whether a non-linear function was applied.
        act: path of the module that applied it, ``None`` when it was a function.
        function: from the projection's output to this value, element by element.
    """

    source: str
    part: int | None
    x: int
    nonlinear: bool
    act: str | None
    function: Callable[[Tensor], Tensor]

    @property
    def key(self) -> tuple[str, int | None, int]:
        """Equal for two functions of the same numbers."""
        return self.source, self.part, self.x


Value = tuple[Stream] | tuple[Stream, Stream]


@dataclass(slots=True)
class _Known:
    """What is known of a tensor.

    Attributes:
        value: the streams that it is made of.
        identity: the number that it shares with its views, copies and casts; given when it is asked for.
        activation: whether it depends on the model's inputs.
        branch: path of the latest projection, if everything in it comes through that.
    """

    value: Value | None = None
    identity: int | None = None
    activation: bool = False
    branch: str | None = None


_NOTHING = _Known()


class ProvenanceMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows streams, identities and branches through every operation that runs inside it.

    Attributes:
        added: projections whose branch was added to something else.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Weak: a trace of a large model must not keep all of its activations alive.
        self._known: MutableMapping[Tensor, _Known] = WeakTensorKeyDictionary()
        self.added: set[str] = set()
        self._next = 0
        for tensor in inputs:
            self._known[tensor] = _Known(activation=True)

    def identity(self, tensor: Tensor) -> int:
        """The number that this tensor shares with its views, copies and casts."""
        known = self._known.get(tensor)
        if known is None:
            self._known[tensor] = known = _Known()
        if known.identity is None:
            self._next += 1
            known.identity = self._next
        return known.identity

    def value(self, tensor: Tensor) -> Value | None:
        """The streams that the tensor is made of, ``None`` when it is anything else."""
        return self._of(tensor).value

    def start(self, tensor: Tensor, source: str, x: int) -> None:
        """Declare a tensor to be the output of the projection ``source`` for the input with identity ``x``."""
        stream = Stream(source, None, x, nonlinear=False, act=None, function=torch.clone)
        self._known[tensor] = _Known((stream,), activation=True, branch=source)

    def blame(self, tensor: Tensor, act: str) -> None:
        """Declare that the module ``act`` computed the non-linearity of a tensor."""
        known = self._of(tensor)
        if known.value is not None and len(known.value) == 1:
            known.value = (replace(known.value[0], act=act),)

    def _of(self, tensor: Tensor) -> _Known:
        """What is known of a tensor. To be changed only where something is."""
        return self._known.get(tensor, _NOTHING)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = operands((*args, *kwargs.values()))
        known = [self._of(tensor) for tensor in inputs]
        packet = func.overloadpacket
        active = packet not in _FACTORIES and any(one.activation for one in known)
        branch = self._branch(packet, [pair for pair in zip(inputs, known, strict=True) if pair[1].activation])
        for tensor in operands((out,)):
            value, identity = self._derive(func, packet, args, kwargs, inputs, known, tensor)
            # Always assigned or deleted: an operation in place returns a tensor that has an entry already.
            if active or value is not None or identity is not None or branch is not None:
                self._known[tensor] = _Known(value, identity, active, branch)
            else:
                self._known.pop(tensor, None)
        return out

    def _branch(self, packet: Any, activations: list[tuple[Tensor, _Known]]) -> str | None:
        """The one projection that an operation's result comes from; notes the sum that ends a branch."""
        if packet in _PRODUCT and len(activations) == 2:
            # A weight per token (the gate of a shared expert, a drop path) leaves the branch a branch.
            wide = [(tensor, known) for tensor, known in activations if tensor.dim() and tensor.shape[-1] != 1]
            activations = wide or activations
        branches = {known.branch for _, known in activations}
        if len(branches) == 1:
            return branches.pop()
        if packet in _SUM:
            self.added |= {branch for branch in branches if branch is not None}
        return None

    def _derive(
        self,
        func: Any,
        packet: Any,
        args: Any,
        kwargs: Any,
        inputs: list[Tensor],
        known: list[_Known],
        out: Tensor,
    ) -> tuple[Value | None, int | None]:
        """Value and identity of one output."""
        if packet in _COPIES or (packet in _HALVES and _same_rows(inputs[0], out)):
            if _same_rows(inputs[0], out):
                return known[0].value, self.identity(inputs[0])
            return None, None
        if packet in _HALVES:
            return _half(inputs[0], known[0].value, out), None
        if torch.Tag.pointwise in func.tags:
            return _pointwise(func, packet, args, kwargs, inputs, known, out), None
        return None, None


def _half(whole: Tensor, value: Value | None, out: Tensor) -> Value | None:
    """The value of one half of the last axis of a fused projection's output."""
    half, odd = divmod(whole.shape[-1], 2) if whole.dim() else (0, 1)
    if value is None or len(value) == 2 or value[0].part is not None or value[0].nonlinear or odd:
        return None
    offset = out.storage_offset() - whole.storage_offset()
    if out.shape != (*whole.shape[:-1], half) or out.stride() != whole.stride() or offset not in (0, half):
        return None
    return (replace(value[0], part=int(offset == half)),)


def _pointwise(
    func: Any, packet: Any, args: Any, kwargs: Any, inputs: list[Tensor], known: list[_Known], out: Tensor
) -> Value | None:
    """The value of an element-wise operation's result."""
    tracked = {id(tensor): one.value for tensor, one in zip(inputs, known, strict=True) if one.value is not None}
    if not tracked or any(one.activation and one.value is None for one in known):
        return None
    if any(tensor.shape != out.shape for tensor in inputs if id(tensor) in tracked):
        return None
    values = [one.value for one in known if one.value is not None]
    linear = _is_linear(packet, args, values, tracked)
    first = values[0]
    if any(len(value) == 2 for value in values):
        return first if linear and len(values) == 1 else None
    streams = [value[0] for value in values]
    keys = {stream.key for stream in streams}
    if len(keys) == 2 and len(streams) == 2 and packet in _PRODUCT and streams[0].x == streams[1].x:
        return (streams[0], streams[1])
    if len(keys) > 1:
        return None
    nonlinear = not linear or any(stream.nonlinear for stream in streams)
    function = _compose(func, args, kwargs, {key: value[0].function for key, value in tracked.items()})
    return (replace(streams[0], nonlinear=nonlinear, act=None, function=function),)


def _same_rows(before: Tensor, after: Tensor) -> bool:
    """Whether a view or copy kept every number and the size of the last axis."""
    same_width = before.dim() > 0 and after.dim() > 0 and before.shape[-1] == after.shape[-1]
    return same_width and before.numel() == after.numel()


def _is_linear(packet: Any, args: tuple[Any, ...], values: list[Value], tracked: dict[int, Value]) -> bool:
    if packet in _LINEAR or packet in _COPIES:
        return True
    if packet in _PRODUCT:
        return len(values) == 1
    return packet in _QUOTIENT and len(values) == 1 and id(args[0]) in tracked


def _compose(func: Any, args: Any, kwargs: Any, functions: dict[int, Callable[[Tensor], Tensor]]) -> Callable[..., Any]:
    """The operation as a function of the projection's output, holding on to constants only."""

    class _Slot:
        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            self.function = function

    def freeze(tensor: Tensor) -> Any:
        return _Slot(functions[id(tensor)]) if id(tensor) in functions else tensor.detach()

    frozen_args, frozen_kwargs = tree_map_only(Tensor, freeze, (args, kwargs))

    def function(x: Tensor) -> Tensor:
        real_args, real_kwargs = tree_map_only(_Slot, lambda slot: slot.function(x), (frozen_args, frozen_kwargs))
        result: Tensor = func(*real_args, **real_kwargs)
        return result

    return function
