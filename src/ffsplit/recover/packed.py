"""What is trained of packed low-bit matrices, in place of them while a recovery runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ffsplit.ffn.projections import Packed
from ffsplit.recover.codes import TrainedCodes
from ffsplit.recover.scales import TrainedScales
from ffsplit.recover.weights import sums_of


@contextmanager
def trained_packed(model: nn.Module, *, codes: bool) -> Iterator[None]:
    """Give every packed matrix of the compressed FFNs something to train; afterwards its tensors have taken that in.

    Args:
        model: with compressed FFNs.
        codes: train the codes too, not the scales alone.
    """
    places = [
        (parent, name)
        for module in sums_of(model).values()
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, Packed)
    ]
    kind = TrainedCodes if codes else TrainedScales
    for parent, name in places:
        parent.add_module(name, kind(getattr(parent, name)))
    try:
        yield
    finally:
        for parent, name in places:
            parent.add_module(name, getattr(parent, name).finished())
