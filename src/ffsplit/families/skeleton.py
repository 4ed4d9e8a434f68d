"""Running a model whose weights are on the meta device, although its code looks at positions and masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ffsplit.families.operands import operands

META = torch.device("meta")


class SkeletonMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes for real whatever does not depend on weights, and only shapes for the rest.

    Token ids, positions and masks live on the CPU, so code that branches on them works; what meets a meta tensor
    becomes one. New tensors that the model asks for on the meta device, because its weights are there, are made on the
    CPU.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        meta = any(tensor.is_meta for tensor in operands((*args, *kwargs.values())))
        if meta:
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(META), (args, kwargs))
        if kwargs.get("device") is not None:
            kwargs["device"] = META if meta else torch.device("cpu")
        return func(*args, **kwargs)


@contextmanager
def skeleton(model: nn.Module) -> Iterator[None]:
    """Let a model run although some of its tensors are on the meta device; nothing changes for any other model."""
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        with SkeletonMode():  # type: ignore[no-untyped-call]
            yield
    else:
        yield
