from __future__ import annotations

from math import cos, pi, sin

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffsplit.ops.importance import cosine_distance, relative_update
from tests.property.amount import examples

properties = examples(50)
seeds = st.integers(0, 2**20)


def pair(tokens: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator), torch.randn(tokens, width, generator=generator)


@given(angle=st.floats(0.0, pi), length=st.floats(1e-3, 1e3))
@properties
def test_the_distance_is_that_of_the_angle(angle: float, length: float) -> None:
    before = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    after = length * torch.tensor([[cos(angle), sin(angle)]], dtype=torch.float64)
    assert float(cosine_distance(before, after)) == pytest.approx(1 - cos(angle), abs=1e-12)


@given(tokens=st.integers(0, 6), width=st.integers(1, 9), seed=seeds)
@properties
def test_no_update_is_no_importance(tokens: int, width: int, seed: int) -> None:
    before, update = pair(tokens, width, seed)
    assert not cosine_distance(before, before).any()
    assert not relative_update(before, before, 1).any()
    grown = [relative_update(before, before + scale * update, 2) for scale in (0.5, 1.0, 2.0)]
    torch.testing.assert_close(grown[0] * 2, grown[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grown[1] * 2, grown[2], rtol=1e-5, atol=1e-6)


@given(width=st.integers(1, 9), scale=st.floats(1e-2, 1e2), seed=seeds)
@properties
def test_the_unit_of_the_stream_does_not_matter(width: int, scale: float, seed: int) -> None:
    before, after = (x.double() for x in pair(5, width, seed))
    for measure in (cosine_distance, lambda a, b: relative_update(a, b, 1), lambda a, b: relative_update(a, b, 2)):
        torch.testing.assert_close(measure(before, after), measure(scale * before, scale * after))


def test_norms_by_hand_and_a_stream_of_zeros() -> None:
    before, after = torch.tensor([[3.0, -4.0], [0.0, 0.0]]), torch.tensor([[4.0, -6.0], [1.0, 0.0]])
    assert float(relative_update(before, after, 1)[0]) == pytest.approx(3 / 7)
    assert float(relative_update(before, after, 2)[0]) == pytest.approx(5**0.5 / 5)
    assert bool(torch.isfinite(relative_update(before, after, 2)).all())
    assert float(cosine_distance(before, after)[1]) == 1.0


def test_a_small_turn_survives_half_precision() -> None:
    """1 - cos of two nearly equal vectors in float32 would be rounding noise."""
    before = torch.ones(1, 4096, dtype=torch.bfloat16)
    after = before.clone()
    after[0, 0] = 1.0078125
    expected = 1 - float((before.double() * after.double()).sum() / (before.double().norm() * after.double().norm()))
    assert float(cosine_distance(before, after)) == pytest.approx(expected, rel=1e-6)
    assert expected > 0
