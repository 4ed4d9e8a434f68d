"""Charts of speed: how it changes with the number of tokens, and what quality costs in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ffsplit.report.chart import (
    COLOURS,
    LINE_HEIGHT,
    Axis,
    Chart,
    Line,
    Mark,
    Tick,
    named_box,
    quality_chart,
    spread,
    ticks,
)
from ffsplit.report.pareto import pareto_front
from ffsplit.report.rows import loss
from ffsplit.report.scale import scale_for, tick_labels


def latency_chart(rows: Sequence[Mapping[str, Any]], width: float, height: float) -> Chart | None:
    """Quality against the time of a decoded token, or of a forward over a window where nothing decodes.

    Times are the reference's divided by each one's speed, as those were taken in turns.
    """
    decodes = rows[0].get("decode_seconds") is not None
    phase, what = ("decode", "Time of a decoded token") if decodes else ("prefill", "Time of a forward over a window")
    reference = rows[0].get(f"{phase}_seconds")

    def of(row: Mapping[str, Any]) -> float | None:
        speed = row.get(f"{phase}_speed")
        return 1e3 * reference / speed if reference and speed else None

    def front(shown: Sequence[Mapping[str, Any]]) -> list[bool]:
        return pareto_front([(of(row) or 0.0, loss(row)) for row in shown])

    return quality_chart(rows, width, height, Axis(of, f"{what}, ms", "ms", front))


def speed_chart(benches: Mapping[str, Mapping[str, Any]], width: float, height: float) -> Chart | None:
    """Speed of all FFNs together, times the dense ones', by tokens in a forward; a line per bench.

    Args:
        benches: documents of ``ffsplit bench`` by checkpoint.
        width: pixels.
        height: pixels.

    Returns:
        The dashed line (``front``) is the dense model's speed. ``None`` if none of them is of a compressed model.
    """
    measured = {
        name: sorted((int(t), s) for t, s in (b.get("ffn_speeds") or {}).items()) for name, b in benches.items()
    }
    measured = {name: points for name, points in measured.items() if points}
    if not measured:
        return None
    box = named_box(measured, width, height)
    tokens = sorted({count for points in measured.values() for count, _ in points})
    x_scale = scale_for(tokens, box[0] + 8, box[2] - 8, log=True)
    y_scale = scale_for(
        [1.0, *(speed for points in measured.values() for _, speed in points)], box[3], box[1], zero=True
    )
    ends = spread([y_scale(points[-1][1]) for points in measured.values()], LINE_HEIGHT)
    lines: list[Line] = []
    marks: list[Mark] = []
    for number, ((name, points), end) in enumerate(zip(measured.items(), ends, strict=True)):
        places = [(x_scale(count), y_scale(speed)) for count, speed in points]
        lines.append(Line(" ".join(f"{x:.1f},{y:.1f}" for x, y in places), number % COLOURS, name, end))
        marks += [
            Mark(x, y, f"{name}: x{speed:.2f} at {count:,} tokens", False)
            for (x, y), (count, speed) in zip(places, points, strict=True)
        ]
    x_ticks = [Tick(x_scale(count), label) for count, label in zip(tokens, tick_labels(tokens), strict=True)]
    return Chart(
        width, height, box, x_ticks, ticks(y_scale, width), "Tokens in a forward", "Speed, times the dense FFNs'",
        marks=marks, lines=lines, front=f"{box[0]:.1f},{y_scale(1):.1f} {box[2]:.1f},{y_scale(1):.1f}",
    )  # fmt: skip
