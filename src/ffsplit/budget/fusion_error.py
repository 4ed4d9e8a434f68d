"""How far FFNs side by side are from the same FFNs one after another, and the runs that stay within a tolerance.

Between the FFNs ``F1 .. Fn`` of a run nothing but the residual stream ``r`` is left. One after another they give
``r1 = r + F1(r)``, ``r2 = r1 + F2(r1)`` and so on, each behind its norm; side by side they give
``r + F1(r) + .. + Fn(r)``. Both are measured in one walk over the model: a run keeps its first member's input and the
stream that it would give side by side, and every further member is tried on the former and added to the latter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ffsplit.budget.fusion import Run, without_attention
from ffsplit.budget.scene import Scene
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.errors import ModelError
from ffsplit.families.blocks import Block
from ffsplit.ffn.weights import FFNWeights
from ffsplit.ops.importance import relative_update


@dataclass(frozen=True)
class Trial:
    """A run that was tried.

    Attributes:
        members: FFNs by their place in the execution order.
        error: ``||side by side - one after another|| / ||one after another||`` of the residual stream after the last
            member, the mean over tokens.
    """

    members: Run
    error: float


@dataclass(frozen=True)
class _Growing:
    """A run so far: ``inputs`` of its first member, and the ``stream`` that it gives, one chunk a sequence."""

    members: Run
    inputs: tuple[Tensor, ...]
    stream: tuple[Tensor, ...]

    def with_one(self, index: int, ffn: FFNWeights) -> _Growing:
        added = (stream + ffn(x) for x, stream in zip(self.inputs, self.stream, strict=True))
        return _Growing((*self.members, index), self.inputs, tuple(added))


@torch.no_grad()
def runs_within(
    scene: Scene, gone: Sequence[int], pairs: Sequence[bool], longest: int | None, tol: float, batches: int | None
) -> tuple[list[Run], list[Trial]]:
    """Runs of at least two FFNs, grown from the first FFN to the last as long as their error is at most ``tol``.

    The stream is that of the dense model without the attentions that go: what is fused earlier is not in it. At most
    four more copies of it, in float32, are kept at one time.

    Args:
        scene: the dense model.
        gone: attentions that are left out, by their place in ``scene.attention``.
        pairs: of :func:`ffsplit.budget.fusion.joinable`.
        longest: members of a run, at most; None for any number.
        tol: of :attr:`Trial.error`.
        batches: calibration batches to measure on; all for None.

    Returns:
        The runs, and all runs that were tried, in execution order.

    Raises:
        ModelError: the text has no tokens at some FFN.
    """
    found: list[Run] = []
    trials: list[Trial] = []
    run: _Growing | None = None
    with without_attention(scene, gone):
        for block, replay in scene.walk(batches, "side by side"):
            index = scene.index_of(block.sites[0])
            joins, leads = index > 0 and pairs[index - 1], index < len(pairs) and pairs[index]
            if not joins:
                run = None
            if not joins and not leads:
                continue
            stream = _stream(replay, block)
            if run is not None and (longest is None or len(run.members) < longest):
                wider = run.with_one(index, _dense(scene, block))
                trials.append(Trial(wider.members, _distance(stream, wider.stream, block)))
                if trials[-1].error <= tol:
                    found = [*(one for one in found if one != run.members), wider.members]
                    run = wider
                    continue
            run = _Growing((index,), _inputs(replay, block), stream) if leads else None
    return found, trials


def _stream(replay: BlockReplay, block: Block) -> tuple[Tensor, ...]:
    """The real rows of what a block gives."""
    outputs = replay.outputs(block)
    return tuple(rows.float() for index, output in outputs for rows in replay.rows(index, block.sites[0], output))


def _inputs(replay: BlockReplay, block: Block) -> tuple[Tensor, ...]:
    """The real rows of what a block's FFN is given."""
    captured = replay.capture(block)[block.sites[0].name]
    rows = tuple(chunk.float() for chunk in captured)
    captured.drop()
    return rows


def _dense(scene: Scene, block: Block) -> FFNWeights:
    return scene.layer_data(block.sites[0], None).ffn


def _distance(wanted: Iterable[Tensor], given: Iterable[Tensor], block: Block) -> float:
    """The mean over tokens of the relative error of ``given``."""
    errors = torch.cat([relative_update(*both, order=2) for both in zip(wanted, given, strict=True)])
    if not len(errors):
        raise ModelError(f"{block.sites[0].name}: the calibration text never reached it")
    return float(errors.mean())
