"""Which operations a forward consists of: found by watching it, so that it holds for every storage and kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ffsplit.ffn.projections import PackedSpec

_PRODUCTS = ("mm", "matmul", "linear", "ffn", "gemv", "gemm")
_VIEWS = frozenset(
    f"aten.{name}" for name in ("view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze",
                                "squeeze", "detach", "alias", "permute", "as_strided", "split", "chunk", "reshape")
)  # fmt: skip


@dataclass(frozen=True)
class Observation:
    """What one forward did.

    Attributes:
        operations: calls that compute something; views do not count.
        products: names of the operations that multiply matrices, in order of first use.
        decoded: whether a packed projection was decoded to floats in between.
        kept: whether one was multiplied by as floats that had been kept from an earlier forward.
    """

    operations: int
    products: tuple[str, ...]
    decoded: bool
    kept: bool = False


@torch.inference_mode()
def observe(module: nn.Module, x: Tensor) -> Observation:
    """Run a forward and look at its operations.

    Args:
        module: maps ``[tokens, d_model]`` to the same.
        x: its input.
    """
    watcher = _Watcher(packed_shapes(module))
    with watcher:
        module(x)
    kept = watcher.by_floats and not watcher.decoded
    return Observation(watcher.operations, tuple(dict.fromkeys(watcher.products)), watcher.decoded, kept)


def packed_shapes(module: nn.Module) -> set[tuple[int, ...]]:
    """``[out, in]`` of the projections that are stored as low-bit codes."""
    specs = [getattr(part, "spec", None) for part in module.modules()]
    return {tuple(spec.shape) for spec in specs if isinstance(spec, PackedSpec)}


class _Watcher(TorchDispatchMode):
    """Counts operations and recognises a decoded matrix by its shape, which no activation has but by chance."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes = shapes
        self.operations = 0
        self.products: list[str] = []
        self.decoded = False
        self.by_floats = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).rpartition(".")[0]
        if name in _VIEWS:
            return result
        self.operations += 1
        if any(word in name for word in _PRODUCTS):
            self.products.append(name)
            self.by_floats |= any(self._is_weight(value) for value in args)
        elif self._is_weight(result):
            self.decoded = True
        return result

    def _is_weight(self, value: Any) -> bool:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != 2:
            return False
        return bool({tuple(value.shape), tuple(value.T.shape)} & self.shapes)
