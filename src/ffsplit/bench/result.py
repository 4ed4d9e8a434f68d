"""What a bench found, as plain values for JSON: versioned, so that a later reader knows what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ffsplit.bench.roofline import Roofline
from ffsplit.bench.whole import PhaseTiming

FORMAT, VERSION = "ffsplit-bench", 1
BENCH_FILE = "ffsplit_bench.json"
"""Under this name in a checkpoint's folder, ``ffsplit compare`` finds it."""


@dataclass(frozen=True)
class FFNTiming:
    """One FFN at one number of tokens. Seconds are medians of a forward, weights out of the cache.

    Attributes:
        tokens: in the forward.
        dense_seconds: of the dense FFN.
        seconds: of the compressed one; ``None`` if it was left dense.
        speed: dense over compressed: 2 is twice as fast.
        moved_bytes: that have to move for one token: weights once, inputs, outputs and hidden activations.
        dense_moved_bytes: the same of the dense FFN.
        bound: ``memory`` or ``compute``: which limits it at best.
        roofline: the least possible time as a share of the measured one.
        dense_roofline: the same of the dense FFN.
        operations: calls in a forward.
        products: names of those that multiply matrices.
        decoded: low-bit weights are decoded to floats in every forward.
        kept: they are multiplied by as floats that were kept from an earlier one.
        peers: seconds of other storages of the same dense FFN.
        verdict: why it is not faster; ``None`` if it is, or was left dense.
    """

    tokens: int
    dense_seconds: float
    seconds: float | None
    speed: float | None
    moved_bytes: float
    dense_moved_bytes: float
    bound: str
    roofline: float
    dense_roofline: float
    operations: int
    products: tuple[str, ...]
    decoded: bool
    kept: bool
    peers: Mapping[str, float] = field(default_factory=dict)
    verdict: str | None = None


@dataclass(frozen=True)
class FFNRow:
    """All FFNs of one structure.

    Attributes:
        first: path of the first; it is the one that was measured.
        last: path of the last.
        count: how many layers have it.
        structure: in words.
        shape: of the dense FFN.
        dense_bytes: of its weights as they are loaded.
        stored_bytes: of the compressed FFN's tensors.
        resident_bytes: held after a forward, with what its kernels keep beside.
        extra_bytes: the most memory that a forward of the largest number of tokens takes beyond that.
        timings: one a number of tokens.
    """

    first: str
    last: str
    count: int
    structure: str
    shape: Mapping[str, Any]
    dense_bytes: int
    stored_bytes: int
    resident_bytes: int
    extra_bytes: int | None
    timings: tuple[FFNTiming, ...]


@dataclass(frozen=True)
class Bench:
    """Everything that was measured.

    Attributes:
        model: as it was given.
        kind: ``dense``, ``stock`` or ``ffsplit``.
        against: the dense model, if it was given.
        dense_ffns: where the dense FFNs come from, in words.
        settings: device, dtype, token counts, rounds.
        roofline: what the machine can do.
        ffns: one row a structure.
        phases: of the whole model; empty with ``ffn_only``.
        phase_verdicts: beside them; why a phase is not faster.
        memory: of the whole model: bytes of weights stored, held after running, and of the dense model.
        peers: measured ones with their relative error against the dense FFN.
        peers_missing: others, with the reason.
        notes: what was left out and why.
        provenance: versions, hardware, threads, load of the machine.
    """

    model: str
    kind: str
    against: str | None
    dense_ffns: str
    settings: Mapping[str, Any]
    roofline: Roofline
    ffns: tuple[FFNRow, ...]
    phases: tuple[PhaseTiming, ...]
    phase_verdicts: tuple[str | None, ...]
    memory: Mapping[str, Any]
    peers: Mapping[str, float]
    peers_missing: Mapping[str, str]
    notes: tuple[str, ...]
    provenance: Mapping[str, Any]

    @property
    def verdicts(self) -> list[str]:
        """Every sentence on what is not faster, the whole model's first."""
        whole = [verdict for verdict in self.phase_verdicts if verdict is not None]
        return whole + [
            f"{row.first} (of {row.count}): {timing.verdict}"
            for row in self.ffns
            for timing in row.timings
            if timing.verdict is not None
        ]

    def ffn_speeds(self) -> dict[int, float]:
        """Speed of all FFNs together by number of tokens; empty for a dense model."""
        return {
            tokens: dense / this
            for tokens in self.settings["tokens"]
            for dense, this in [self._totals(tokens)]
            if any(row.timings[0].seconds is not None for row in self.ffns)
        }

    def _totals(self, tokens: int) -> tuple[float, float]:
        timings = [(row.count, t) for row in self.ffns for t in row.timings if t.tokens == tokens]
        dense = sum(count * t.dense_seconds for count, t in timings)
        return dense, sum(count * (t.dense_seconds if t.seconds is None else t.seconds) for count, t in timings)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        document["phases"] = [
            {
                **asdict(phase),
                "speed": phase.speed,
                "ffn_share": phase.ffn_share,
                "limit": phase.limit,
                "tokens_per_second": {name: phase.tokens_per_second(name) for name in phase.seconds},
                "verdict": verdict,
            }
            for phase, verdict in zip(self.phases, self.phase_verdicts, strict=True)
        ]
        del document["phase_verdicts"]
        return document | {"ffn_speeds": self.ffn_speeds(), "verdicts": self.verdicts}
