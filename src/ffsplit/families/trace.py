"""One traced forward: which projections were called, on what, and what became of their outputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ffsplit.families.forward import Inputs, drive
from ffsplit.families.hooked import HookedRun, tensors_in
from ffsplit.families.provenance import ProvenanceMode, Value


@dataclass(frozen=True)
class DownCall:
    """A projection that was called on the stream(s) of other projections: perhaps the ``down`` of an FFN.

    Attributes:
        path: path of the projection.
        value: what its input is made of.
        hidden: identity of its input.
        output: identity of its output.
    """

    path: str
    value: Value
    hidden: int
    output: int


@dataclass(frozen=True)
class ModuleCall:
    """A module that was called with one tensor and nothing else, and returned one tensor of as many rows.

    Attributes:
        path: path of the module.
        x: identity of its input.
        output: identity of its output.
    """

    path: str
    x: int
    output: int


@dataclass(frozen=True)
class Flow:
    """Identities of the tensors that an element of a layer list was called with, and of those that it returned."""

    given: tuple[int, ...]
    returned: tuple[int, ...]


@dataclass
class Trace:
    """What one or more traced forwards saw. Paths are those of the model that was traced.

    Attributes:
        downs: calls of projections on streams, in execution order.
        simple: modules called with one tensor for one tensor, innermost first.
        flows: the calls of the elements of layer lists, by path, in execution order.
        calls: how often each module was called.
        added: projections whose output was, through norms at most, added to something else: a residual stream.
    """

    downs: list[DownCall] = field(default_factory=list)
    simple: list[ModuleCall] = field(default_factory=list)
    flows: dict[str, list[Flow]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    added: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Call:
    """What was known when a module was called. It may work in place, so afterwards is too late.

    Attributes:
        single: value and identity of the argument, when there is one tensor and nothing else.
        given: identities of all tensors.
    """

    single: tuple[Value | None, int] | None
    given: tuple[int, ...]


class Tracer(HookedRun):
    """Fills a `Trace` while the model runs inside it."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        mode = ProvenanceMode(tensors_in(dict(inputs)))
        super().__init__({module: name for name, module in model.named_modules()}, mode)
        self.trace = Trace(added=mode.added)
        self._elements = {
            element for module in self._names if isinstance(module, nn.ModuleList) for element in module.children()
        }
        self._running: list[_Call] = []

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        path, mode = self._names[module], self._mode
        self.trace.calls[path] += 1
        if module in self._elements:
            self.trace.flows.setdefault(path, [])
        single = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        self._running.append(
            _Call((mode.value(args[0]), mode.identity(args[0])) if single else None, self._identities((args, kwargs)))
        )

    def _identities(self, tree: Any) -> tuple[int, ...]:
        return tuple(self._mode.identity(leaf) for leaf in tensors_in(tree))

    def _after_projection(self, module: nn.Module, _args: Any, output: Any) -> None:
        before = self._running.pop().single
        if before is None or not isinstance(output, Tensor):
            return
        (value, x), path = before, self._names[module]
        self._mode.start(output, path, x)
        if value is not None:
            self.trace.downs.append(DownCall(path, value, x, self._mode.identity(output)))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self._running.pop()
        if module in self._elements:
            self.trace.flows[self._names[module]].append(Flow(call.given, self._identities(output)))
        before = call.single
        if before is None or not isinstance(output, Tensor):
            return
        (value, x), path = before, self._names[module]
        if args[0].shape[:-1] == output.shape[:-1]:
            self.trace.simple.append(ModuleCall(path, x, self._mode.identity(output)))
        after = self._mode.value(output)
        if value is None or after is None or len(value) != 1 or len(after) != 1:
            return
        if after[0].nonlinear and not value[0].nonlinear and value[0].key == after[0].key:
            self._mode.blame(output, path)


def trace_model(model: PreTrainedModel, inputs: Inputs | None = None) -> dict[str, Trace]:
    """Trace the model, and whichever of its sub-models that run did not reach, on tiny inputs.

    Returns:
        Traces by the path of what was run; the model itself has the empty path.

    Raises:
        ModelError: nothing could be run.
    """
    tracers = drive(model, lambda kwargs: Tracer(model, kwargs), inputs)
    return {path: tracer.trace for path, tracer in tracers.items()}
