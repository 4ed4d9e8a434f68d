"""One traced forward: what produced each projection's input, and what else became of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ffsplit.families.forward import Inputs
from ffsplit.families.hooked import HookedRun, tensors_in
from ffsplit.families.projection import is_projection
from ffsplit.families.provenance import ProvenanceMode


class _UseMode(ProvenanceMode):  # type: ignore[no-untyped-call]
    """Follows identities, and notes every operation outside a projection that makes something new of a tensor.

    Attributes:
        running: paths of the modules at work, innermost last.
        uses: the first such operation, by the identity of the tensor.
    """

    def __init__(self, inputs: Iterable[Tensor], projections: frozenset[str]) -> None:
        super().__init__(inputs)
        self._projections = projections
        self.running: list[str] = []
        self.uses: dict[int, str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        taken = tensors_in((args, kwargs or {}))
        # Before the operation: one in place gives its result the tensor's place.
        identities = [self.identity(tensor) for tensor in taken]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        where = self.running[-1] if self.running else ""
        if where not in self._projections:
            made = {self.identity(leaf) for leaf in tensors_in(out)}
            for identity in identities:
                if identity not in made:  # a view or a copy passes the numbers on, and is followed
                    self.uses.setdefault(identity, f"{func.overloadpacket} in {where or 'the model'}")
        return out


class NormTracer(HookedRun):
    """What one forward gave to every module and took from it.

    Attributes:
        given: identities of the tensors that each projection was called with, by its path.
        gave: identities of the tensors that each other module returned, by its path, innermost modules first.
        uses: an operation that was no projection's and made something new of a tensor, by the tensor's identity.
        returned: identities of what the model itself returned.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        names = {module: name for name, module in model.named_modules()}
        projections = frozenset(name for module, name in names.items() if is_projection(module))
        mode = _UseMode(tensors_in(dict(inputs)), projections)
        super().__init__(names, mode)
        self.given: dict[str, set[int]] = defaultdict(set)
        self.gave: dict[str, set[int]] = defaultdict(set)
        self.returned: set[int] = set()
        self.uses = mode.uses

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        path = self._names[module]
        self._mode.running.append(path)
        if is_projection(module):
            self.given[path] |= self._identities((args, kwargs))

    def _after(self, module: nn.Module, _args: Any, output: Any) -> None:
        path = self._mode.running.pop()
        if not path:
            self.returned |= self._identities(output)
        elif isinstance(output, Tensor) and not is_projection(module):
            self.gave[path].add(self._mode.identity(output))

    def _identities(self, tree: Any) -> set[int]:
        return {self._mode.identity(leaf) for leaf in tensors_in(tree)}

    def producer(self, projection: str) -> str | None:
        """The innermost module whose output a projection was called with, the first of several."""
        return next((path for path, gave in self.gave.items() if self.given[projection] & gave), None)
