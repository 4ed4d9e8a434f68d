"""One traced forward: which modules attend, what they were given, and which projections followed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ffsplit.families.forward import Inputs
from ffsplit.families.hooked import HookedRun, tensors_in
from ffsplit.families.provenance import ProvenanceMode

ATTENDING = ("softmax", "scaled_dot_product")
"""Parts of the names of operations by which tokens look at each other."""


@dataclass(frozen=True)
class OutCall:
    """A projection that was called with one tensor.

    Attributes:
        path: of the projection.
        x: identity of its input.
        y: identity of its output.
    """

    path: str
    x: int
    y: int


@dataclass(frozen=True)
class HostCall:
    """A module in which an attending operation ran.

    Attributes:
        path: of the module.
        given: identities of the tensors that it was called with, by keyword; by the empty one for the first argument.
        returned: identities of the tensors that it returned.
        returns: how many values it returned as a tuple, 0 when it was no tuple.
    """

    path: str
    given: Mapping[str, int]
    returned: tuple[int, ...]
    returns: int


class _AttendingMode(ProvenanceMode):  # type: ignore[no-untyped-call]
    """Follows identities and branches, and notes in which modules an attending operation ran.

    Attributes:
        running: paths of the modules at work, innermost last.
        attended: paths of modules in which an attending operation ran.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__(inputs)
        self.running: list[str] = []
        self.attended: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(part in str(func) for part in ATTENDING):
            self.attended |= set(self.running)
        return super().__torch_dispatch__(func, types, args, kwargs)


class AttentionTracer(HookedRun):
    """Which modules attended in one forward, and which projections it called.

    Attributes:
        outs: the calls of projections, by path, in execution order.
        hosts: the calls of modules that attended.
        added: projections whose output was, through norms at most, added to something else: a residual stream.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        mode = _AttendingMode(tensors_in(dict(inputs)))
        super().__init__({module: name for name, module in model.named_modules() if name}, mode)
        self.added = mode.added
        self._given: list[dict[str, int]] = []
        self.outs: dict[str, list[OutCall]] = {}
        self.hosts: list[HostCall] = []

    def follows(self, call: OutCall) -> bool:
        """Whether a projection ends an attention: an attending module returned its input, or its output."""
        return any(host.returned[:1] in ((call.x,), (call.y,)) for host in self.hosts)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        mode = self._mode
        mode.running.append(self._names[module])
        named = {"": args[0], **kwargs} if args else kwargs
        given = {name: mode.identity(value) for name, value in named.items() if isinstance(value, Tensor)}
        self._given.append(given)

    def _after_projection(self, _module: nn.Module, _args: Any, output: Any) -> None:
        path, given = self._mode.running.pop(), self._given.pop()
        if isinstance(output, Tensor) and given:
            x = next(iter(given.values()))
            self._mode.start(output, path, x)
            self.outs.setdefault(path, []).append(OutCall(path, x, self._mode.identity(output)))

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> None:
        path, given = self._mode.running.pop(), self._given.pop()
        if path in self._mode.attended and isinstance(output, Tensor | tuple):
            returned = tuple(self._mode.identity(leaf) for leaf in tensors_in(output))
            returns = len(output) if isinstance(output, tuple) else 0
            self.hosts.append(HostCall(path, given, returned, returns))
