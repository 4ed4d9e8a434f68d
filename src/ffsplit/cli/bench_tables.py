"""What ``bench`` prints: FFNs, peers, the whole model, memory, and every sentence on what is not faster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ffsplit.cli.tables import line, percent, show, show_facts, size

if TYPE_CHECKING:
    from ffsplit.bench.result import Bench, FFNRow
    from ffsplit.bench.whole import PhaseTiming

NOTHING = "–"


def show_bench(bench: Bench) -> None:
    """All tables and sentences."""
    show_facts(f"{bench.model} on {bench.settings['device']}, {bench.settings['dtype']}", _machine(bench))
    compressed = bench.kind != "dense"
    show(
        "FFNs: milliseconds of a forward",
        ("first of", "layers", "structure", "tokens", "dense", *(("this", "speed") if compressed else ()), "bound",
         "of roofline", "MB/token"),
        [cells for row in bench.ffns for cells in _ffn(row, compressed)],
        words=3,
    )  # fmt: skip
    _show_peers(bench)
    if bench.phases:
        show(
            "Whole model: milliseconds of a forward",
            ("phase", "tokens", "dense", *(("this", "speed") if compressed else ()), "tokens/s", "FFN share",
             "best possible"),
            [_phase(phase, compressed) for phase in bench.phases],
        )  # fmt: skip
        line("FFN share: of the dense model's time. Best possible: the speed with FFNs that take no time (Amdahl).\n")
    show_facts("Memory", _memory(bench))
    for verdict in bench.verdicts:
        line(f"! {verdict}")
    for note in bench.notes:
        line(f"Note: {note}.")


def _machine(bench: Bench) -> Iterator[tuple[str, str]]:
    roofline, hardware = bench.roofline, bench.provenance["hardware"]
    yield "machine", f"{hardware['accelerator'] or hardware['cpu']}, {hardware['threads']} threads"
    yield "copy bandwidth", f"{roofline.copy / 1e9:,.1f} GB/s (only reading: {roofline.read / 1e9:,.1f} GB/s)"
    yield "matrix products", f"{roofline.gemm / 1e9:,.0f} GFLOP/s in {roofline.dtype}"
    yield "one small operation", f"{1e6 * roofline.call_seconds:.1f} us"
    yield "dense FFNs", bench.dense_ffns
    if (load := bench.provenance["load_average"]) is not None:
        yield "load average", " ".join(f"{value:.2f}" for value in load)


def _ffn(row: FFNRow, compressed: bool) -> Iterator[tuple[str, ...]]:
    for index, timing in enumerate(row.timings):
        told = (row.first, str(row.count), row.structure) if index == 0 else ("", "", "")
        this = () if not compressed else (_ms(timing.seconds), _times(timing.speed))
        yield (
            *told, f"{timing.tokens:,}", _ms(timing.dense_seconds), *this, timing.bound, percent(timing.roofline, 0),
            f"{timing.moved_bytes / 1e6:,.3f}",
        )  # fmt: skip


def _show_peers(bench: Bench) -> None:
    if bench.peers:
        row = bench.ffns[0]
        show(
            "Other storages: speed against the dense FFN, by tokens",
            ("storage", *(f"{timing.tokens:,}" for timing in row.timings), "relative error"),
            [
                (name, *(_times(t.dense_seconds / t.peers[name]) for t in row.timings), f"{error:.4f}")
                for name, error in bench.peers.items()
                if all(name in timing.peers for timing in row.timings)
            ],
        )
    for name, reason in bench.peers_missing.items():
        line(f"Not measured: {name}: {reason}.")
    if bench.peers_missing:
        line("")


def _phase(phase: PhaseTiming, compressed: bool) -> tuple[str, ...]:
    this = () if not compressed else (_ms(phase.seconds["this"]), _times(phase.speed))
    subject = "this" if compressed else "dense"
    name = f"{phase.phase}, {'one sequence' if phase.phase == 'prefill' else 'sequences'}"
    return (
        f"{name}{' (graph)' if phase.graph else ''}", f"{phase.tokens:,}", _ms(phase.seconds["dense"]), *this,
        f"{phase.tokens_per_second(subject):,.1f}", percent(phase.ffn_share, 0), f"x{phase.limit:.2f}",
    )  # fmt: skip


def _memory(bench: Bench) -> Iterator[tuple[str, str]]:
    memory = bench.memory
    yield "weights as loaded", f"{size(memory['bytes'])} (dense: {size(memory['dense_bytes'])})"
    yield "held after running", size(memory["resident_bytes"])
    if memory["disk_bytes"] is not None:
        yield "weight files", size(memory["disk_bytes"])
    for row in bench.ffns:
        extra = NOTHING if row.extra_bytes is None else size(row.extra_bytes)
        held = f"{size(row.stored_bytes)} stored, {size(row.resident_bytes)} held (dense: {size(row.dense_bytes)})"
        yield row.first, f"{held}, {extra} more during a forward of {row.timings[-1].tokens:,} tokens"


def _ms(seconds: float | None) -> str:
    return NOTHING if seconds is None else f"{1e3 * seconds:,.3f}"


def _times(speed: float | None) -> str:
    return NOTHING if speed is None else f"x{speed:.2f}"
