"""Which FFNs may run side by side: what a model does with two FFNs once the attention between them is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ffsplit.budget.scene import Scene
from ffsplit.calibrate.drift import adds_its_output
from ffsplit.families import drop_attention
from ffsplit.families.masking import masked
from ffsplit.families.surgery import restore

ROWS = 64
"""Tokens whose inputs are compared."""
Run = tuple[int, ...]
"""FFNs by their place in the execution order."""


def adding(scene: Scene) -> set[int]:
    """The FFNs whose output is simply added to the residual stream: no norm, no factor, tried out on one batch."""
    found = set()
    for block, replay in scene.walk(1, "outputs"):
        if not block.whole_model and len(block.sites) == 1 and adds_its_output(replay, block):
            found.add(scene.index_of(block.sites[0]))
    return found


def joinable(scene: Scene, gone: Sequence[int], adding_ones: set[int]) -> list[bool]:
    """For every FFN but the last, whether it and the next one see the same input when neither adds anything.

    Args:
        scene: the dense model.
        gone: attentions that are left out, by their place in ``scene.attention``.
        adding_ones: of :func:`adding`.
    """
    inputs, acts = _inputs(scene, gone), [scene.act(index) for index in range(len(scene.shapes))]

    def alike(first: int, second: int) -> bool:
        return (
            {first, second} <= adding_ones
            and scene.shapes[first] == scene.shapes[second]
            and _same_act(acts[first], acts[second])
            # To the bit: the stream is the same one, and norms without weights do the same to it.
            and torch.equal(inputs[first], inputs[second])
        )

    return [alike(first, second) for first, second in pairwise(range(len(scene.shapes)))]


def runs_of(pairs: Sequence[bool], longest: int | None) -> list[Run]:
    """The longest runs of neighbours that may be joined, cut after ``longest`` members; two members at least."""
    found: list[list[int]] = [[0]]
    for index, join in enumerate(pairs, 1):
        if join and (longest is None or len(found[-1]) < longest):
            found[-1].append(index)
        else:
            found.append([index])
    return [tuple(run) for run in found if len(run) > 1]


@torch.no_grad()
def _inputs(scene: Scene, gone: Sequence[int]) -> dict[int, Float[Tensor, "tokens d_model"]]:
    """The first tokens' inputs of all FFNs while all of them give zeros and some attentions are left out."""
    inputs: dict[int, Tensor] = {}

    def keeping(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.setdefault(index, args[0].reshape(-1, args[0].shape[-1])[:ROWS].clone())

        return keep

    sites = scene.found.sites
    with ExitStack() as stack:
        stack.enter_context(without_attention(scene, gone))
        stack.enter_context(masked(scene.model, *(site.down for site in sites)))
        for index, site in enumerate(sites):
            handle = scene.model.get_submodule(site.up).register_forward_pre_hook(keeping(index))
            stack.callback(handle.remove)
        walk = stack.enter_context(closing(scene.walk(1, "inputs", to_the_end=True)))
        block, replay = next(walk)
        for _ in replay.finish(block):
            pass
    return inputs


@contextmanager
def without_attention(scene: Scene, gone: Sequence[int]) -> Iterator[None]:
    """The model without some attentions, by their place in ``scene.attention``, for a while."""
    taken = []
    try:
        for place in gone:
            taken.append(drop_attention(scene.model, scene.attention[place]))
        yield
    finally:
        for modules in reversed(taken):
            restore(scene.model, modules)


def _same_act(first: nn.Module, second: nn.Module) -> bool:
    mine, theirs = first.state_dict(), second.state_dict()
    same = repr(first) == repr(second) and mine.keys() == theirs.keys()
    return same and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
