"""What a compression will take: memory while it runs, disk for its result. Counting only, no weights needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ffsplit.families import Block, FFNs, read
from ffsplit.ffn.shape import FFNShape

WIDE = 8
"""Bytes of a float64, which statistics and fits use."""
COMMON_BUDGETS: dict[str, dict[str, float]] = {
    "keep 0.75": {"keep": 0.75},
    "keep 0.5": {"keep": 0.5},
    "4 bits": {"bits": 4.0},
    "3 bits": {"bits": 3.0},
}


@dataclass(frozen=True)
class Footprint:
    """Bytes that compressing a model needs, apart from the libraries themselves.

    Attributes:
        samples: calibration windows that it was counted for.
        seq_len: tokens of each.
        model_bytes: of the dense model.
        statistics_bytes: of the largest layer's sums.
        activation_cache_bytes: of what waits for the next layer; on disk with a cache directory.
        fit_bytes: of the largest layer's fit beside the sums: weights in float32, one window's activations in
            float64, a second Gram for the refit and its factor.
        peak_bytes: of all that together.
        disk_bytes: of the weights at common budgets.
    """

    samples: int
    seq_len: int
    model_bytes: int
    statistics_bytes: int
    activation_cache_bytes: int
    fit_bytes: int
    peak_bytes: int
    disk_bytes: dict[str, int]


def footprint(model: nn.Module, found: FFNs, *, itemsize: int, samples: int, seq_len: int) -> Footprint:
    """Count for one run.

    Args:
        model: that the FFNs were found in; may be on the meta device.
        found: its FFNs.
        itemsize: bytes of a stored weight.
        samples: calibration windows.
        seq_len: tokens of each.
    """
    shapes = [FFNShape.of(read(model, site)) for site in found.sites]
    model_bytes = found.coverage.model_parameters * itemsize
    statistics = max(map(statistics_bytes, shapes))
    cache = samples * seq_len * itemsize * cached_width(found)
    fit = max(_fit_bytes(shape, seq_len) for shape in shapes)
    return Footprint(
        samples=samples,
        seq_len=seq_len,
        model_bytes=model_bytes,
        statistics_bytes=statistics,
        activation_cache_bytes=cache,
        fit_bytes=fit,
        peak_bytes=model_bytes + statistics + cache + fit,
        disk_bytes={
            label: disk_bytes(shapes, model_bytes, itemsize, **budget) for label, budget in COMMON_BUDGETS.items()
        },
    )


def statistics_bytes(shape: FFNShape) -> int:
    """Bytes of one layer's :class:`~ffsplit.calibrate.statistics.FFNStatistics`."""
    return WIDE * (shape.d_model**2 + 2 * shape.d_model + shape.d_ff**2 + 6 * shape.d_ff + 2)


def cached_width(found: FFNs) -> int:
    """Numbers that the activation cache holds for a token: one stream per layer list and one block's FFN inputs.

    What some blocks hand on beside the hidden states (T5's position biases) is not counted.
    """

    def inputs(block: Block) -> int:
        return sum(site.d_model * found.calls[site.name] for site in block.sites)

    streams = {block.list_path: block.sites[0].d_model for block in found.blocks if block.path}
    return sum(streams.values()) + max(map(inputs, found.blocks))


def disk_bytes(
    shapes: Sequence[FFNShape], model_bytes: int, itemsize: int, *, keep: float | None = None, bits: float | None = None
) -> int:
    """Bytes of the weights with the FFNs at a budget and everything else as it is."""
    dense = sum(shape.parameters for shape in shapes) * itemsize
    if bits is not None:
        return model_bytes - dense + round(bits * sum(shape.weights for shape in shapes) / 8)
    assert keep is not None
    return model_bytes - dense + round(keep * dense)


def _fit_bytes(shape: FFNShape, seq_len: int) -> int:
    window = seq_len * (3 * shape.d_ff + 2 * shape.d_model)
    return 4 * shape.parameters + WIDE * (window + 3 * shape.d_ff**2)
