"""English text that every CPython ships, so that a machine without a network has something to calibrate on."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Literal

from ffsplit.errors import DataError

BLANK_LINES = re.compile(r"\n[ \t]*\n")


def builtin_documents(split: Literal["calibration", "evaluation"]) -> list[str]:
    """One half of the Python help topics (``pydoc_data.topics``): technical English prose with some code.

    Topics are taken in sorted order, alternately for calibration and for evaluation. Several topics quote each
    other at length, so a paragraph counts only where it is seen first: the halves share no paragraph, and neither
    repeats one. The text differs a little between Python versions; the hash of what was read tells them apart.

    Raises:
        DataError: this Python was built without its help topics.
    """
    halves = disjoint_halves(_topics())
    return halves[0] if split == "calibration" else halves[1]


def disjoint_halves(topics: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Alternate the sorted topics between two halves and keep every paragraph once, at its first occurrence."""
    seen: set[str] = set()
    halves: tuple[list[str], list[str]] = ([], [])
    for index, name in enumerate(sorted(topics)):
        fresh = []
        for paragraph in BLANK_LINES.split(topics[name]):
            # A nested quotation is indented and wrapped differently, so compare words, not spaces.
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                fresh.append(paragraph.strip("\n"))
        if fresh:
            halves[index % 2].append("\n\n".join(fresh))
    return halves


def _topics() -> Mapping[str, str]:
    try:
        module = importlib.import_module("pydoc_data.topics")
    except ImportError as error:
        raise DataError(
            "source 'builtin': this Python was built without pydoc_data.topics; name a text file instead"
        ) from error
    topics: Mapping[str, str] = module.topics
    return topics
