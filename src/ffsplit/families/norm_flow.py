"""One traced forward: what produced each projection's input, and what else became of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Self

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ffsplit.families.forward import Inputs
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
        taken = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        # Before the operation: one in place gives its result the tensor's place.
        identities = [self.identity(tensor) for tensor in taken]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        where = self.running[-1] if self.running else ""
        if where not in self._projections:
            made = {self.identity(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
            for identity in identities:
                if identity not in made:  # a view or a copy passes the numbers on, and is followed
                    self.uses.setdefault(identity, f"{func.overloadpacket} in {where or 'the model'}")
        return out


class NormTracer:
    """Context manager around one forward. Removes its hooks in every case.

    Attributes:
        given: identities of the tensors that each projection was called with, by its path.
        gave: identities of the tensors that each other module returned, by its path, innermost modules first.
        uses: an operation that was no projection's and made something new of a tensor, by the tensor's identity.
        returned: identities of what the model itself returned.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        projections = frozenset(name for module, name in self._names.items() if is_projection(module))
        self._mode = _UseMode((leaf for leaf in tree_leaves(dict(inputs)) if isinstance(leaf, Tensor)), projections)
        self._handles: list[RemovableHandle] = []
        self.given: dict[str, set[int]] = defaultdict(set)
        self.gave: dict[str, set[int]] = defaultdict(set)
        self.returned: set[int] = set()
        self.uses = self._mode.uses

    def __enter__(self) -> Self:
        for module in self._names:
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after))
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        self._mode.__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

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
        return {self._mode.identity(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}

    def producer(self, projection: str) -> str | None:
        """The innermost module whose output a projection was called with, the first of several."""
        return next((path for path, gave in self.gave.items() if self.given[projection] & gave), None)
