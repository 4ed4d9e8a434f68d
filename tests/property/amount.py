"""How many examples a property is tried on."""

from __future__ import annotations

from hypothesis import settings

USUAL = 100
"""Examples of a property that asks for no number, in the profile of ``make test``."""


def examples(count: int) -> settings:
    """``count`` examples in ``make test``, and in the profile ``thorough`` of ``make test-slow`` as much more."""
    return settings(max_examples=max(1, count * settings.default.max_examples // USUAL))
