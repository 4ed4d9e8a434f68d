"""The columns of a comparison, in one place for the terminal and the page: headings and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """One column of numbers.

    Attributes:
        key: of a row.
        heading: short.
        unit: a second line under the heading; may be empty.
        write: a number as text.
        about: what the number is, in a sentence.
    """

    key: str
    heading: str
    unit: str
    write: Callable[[float], str]
    about: str

    def text(self, row: Mapping[str, Any]) -> str:
        """The row's number as text."""
        value = row.get(self.key)
        if value is None or math.isnan(value):
            return MISSING
        return self.write(value) if math.isfinite(value) else "∞"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}"


def perplexity(value: float) -> str:
    return f"{value:,.2f}" if value < 10_000 else f"{value:,.0f}" if value < 1e7 else f"{value:.1e}"


def distance(value: float) -> str:
    return f"{value:.4f}"


def factor(value: float) -> str:
    return f"{value:.2f}"


COLUMNS = (
    Column("keep_ffn", "FFN kept", "%", percent, "Share of the FFN parameters that are still stored."),
    Column("keep_model", "Model kept", "%", percent, "The same of all the model's parameters."),
    Column("bits_ffn", "FFN bits", "per weight", factor,
           "Stored bits per weight of the dense FFN; scales, zeros and biases are counted, a float as 16 bits."),
    Column("bytes_disk", "Disk", "MB", megabytes, "Weight files."),
    Column("bytes_memory", "Memory", "MB", megabytes, "Parameters and buffers of the loaded model."),
    Column("perplexity", "Perplexity", "", perplexity, "On the text below; lower is better."),
    Column("accuracy", "Accuracy", "% of masked", percent, "Masked tokens that are guessed right; higher is better."),
    Column("cosine", "Cosine", "to reference", distance,
           "Mean cosine of the last hidden states with the reference's; 1 is identical."),
    Column("kl", "KL", "nats/token", distance, "Mean divergence from the reference's predictions; 0 is identical."),
    Column("top1", "Top-1", "% same", percent, "Tokens for which it and the reference have the same first choice."),
    Column("prefill_speed", "Prefill", "× ref.", factor,
           "Speed of one forward over a window relative to the reference; above 1 is faster."),
    Column("decode_speed", "Decode", "× ref.", factor,
           "Speed of greedy decoding relative to the reference; above 1 is faster."),
)  # fmt: skip


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns for which at least one row has a number."""
    return [column for column in COLUMNS if any(row.get(column.key) is not None for row in rows)]
