"""Self-guided training: every compressed FFN starts as its dense original, which is then faded out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffsplit.families import find_ffns, read
from ffsplit.ffn.sum import SumFFN
from ffsplit.ffn.weights import FFNWeights


class Guide:
    """How much of the dense originals is mixed in: one at step 0, none from step ``steps`` on.

    Attributes:
        share: of the dense output in ``share FFN(x) + (1 - share) sum(x)``.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.share = 1.0

    def at(self, step: int) -> None:
        """Set the share of a step: half a cosine."""
        self.share = (1 + math.cos(math.pi * min(step / self.steps, 1.0))) / 2

    def mix(self, dense: FFNWeights, _module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """A forward hook. What is measured without gradients is always the compressed FFN alone."""
        if not torch.is_grad_enabled() or self.share == 0:
            return output
        return output + self.share * (dense(inputs[0]) - output)


@contextmanager
def guided(student: PreTrainedModel, teacher: PreTrainedModel, steps: int) -> Iterator[Guide]:
    """Mix the teacher's FFNs into the student's; afterwards the student stands alone.

    The dense weights are those of the teacher and stay frozen, where the paper trains its guide too.

    Args:
        student: whose FFNs are sums, in float32.
        teacher: the dense model, on the same device.
        steps: over which the guide fades.

    Reference: Wei et al., StructuredFFN, arXiv 2406.16450, self-guided training.
    """
    guide = Guide(steps)
    handles = []
    for site in find_ffns(teacher).sites:
        module = student.get_submodule(site.name)
        if isinstance(module, SumFFN):
            dense = read(teacher, site).map(Tensor.float)
            handles.append(module.register_forward_hook(partial(guide.mix, dense)))
    try:
        yield guide
    finally:
        for handle in handles:
            handle.remove()
