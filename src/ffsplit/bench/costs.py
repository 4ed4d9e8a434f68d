"""What a forward of an FFN has to do at least, held against what it took."""

from __future__ import annotations

from dataclasses import dataclass

from ffsplit.bench.observe import Observation
from ffsplit.bench.result import FFNTiming
from ffsplit.bench.roofline import Roofline
from ffsplit.bench.verdict import Evidence, ffn_verdict
from ffsplit.ffn.spec import SumSpec


@dataclass(frozen=True)
class Side:
    """The dense FFN or the compressed one at one number of tokens.

    Attributes:
        spec: its structure.
        weight_bytes: of its tensors.
        tokens: in the forward.
        itemsize: bytes of an activation.
        seconds: measured.
        seen: its operations.
    """

    spec: SumSpec
    weight_bytes: int
    tokens: int
    itemsize: int
    seconds: float
    seen: Observation

    @property
    def moved(self) -> float:
        """Bytes of a forward: weights once, input and output, hidden activations written and read."""
        hidden = sum((2 if branch.gate is not None else 1) * branch.neurons for branch in self.spec.branches)
        return self.weight_bytes + self.tokens * self.itemsize * 2 * (self.spec.d_model + hidden)

    @property
    def macs(self) -> float:
        return self.spec.macs * self.tokens

    def share(self, roofline: Roofline) -> float:
        """The least possible time over the measured one."""
        return roofline.seconds(self.moved, self.macs) / self.seconds if self.seconds > 0 else 0.0


def ffn_timing(dense: Side, this: Side | None, roofline: Roofline, peers: dict[str, float]) -> FFNTiming:
    """Everything about one FFN at one number of tokens.

    Args:
        dense: the dense FFN.
        this: the compressed one; ``None`` if it was left dense.
        roofline: of the machine.
        peers: seconds of other storages.
    """
    subject = dense if this is None else this
    bound = roofline.bound(subject.moved, subject.macs)
    return FFNTiming(
        tokens=dense.tokens,
        dense_seconds=dense.seconds,
        seconds=None if this is None else this.seconds,
        speed=None if this is None else dense.seconds / this.seconds,
        moved_bytes=subject.moved / subject.tokens,
        dense_moved_bytes=dense.moved / dense.tokens,
        bound=bound,
        roofline=subject.share(roofline),
        dense_roofline=dense.share(roofline),
        operations=subject.seen.operations,
        products=subject.seen.products,
        decoded=subject.seen.decoded,
        kept=subject.seen.kept,
        peers=peers,
        verdict=None if this is None else ffn_verdict(_evidence(dense, this, roofline, bound)),
    )


def _evidence(dense: Side, this: Side, roofline: Roofline, bound: str) -> Evidence:
    return Evidence(
        tokens=this.tokens,
        speed=dense.seconds / this.seconds,
        bound=bound,
        roofline=this.share(roofline),
        bytes_ratio=this.moved / dense.moved,
        macs_ratio=this.macs / dense.macs if dense.macs else 1.0,
        operations=this.seen.operations,
        dense_operations=dense.seen.operations,
        calls_share=this.seen.operations * roofline.call_seconds / this.seconds,
        decoded=this.seen.decoded,
        kept=this.seen.kept,
        masked=this.spec.skip is not None or any(branch.selector is not None for branch in this.spec.branches),
    )
