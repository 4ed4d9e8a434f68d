"""Letting the last projection of an FFN or an attention give zeros for a while: the model as if it were not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def masked(model: nn.Module, *outs: str) -> Iterator[None]:
    """Let projections give zeros.

    Args:
        model: that they are in.
        outs: their paths, such as the ``down`` of FFNs.
    """
    with ExitStack() as stack:
        for path in outs:
            handle = model.get_submodule(path).register_forward_hook(
                lambda _module, _args, output: torch.zeros_like(output)
            )
            stack.callback(handle.remove)
        yield
