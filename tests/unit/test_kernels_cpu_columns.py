"""Tall matrices by columns: the same numbers, for few tokens, where there is room."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ffsplit.ffn.projections import LowRank
from ffsplit.kernels import cpu_columns
from ffsplit.kernels.cache import DerivedCache, decoded_room, set_decoded_limit
from ffsplit.kernels.cpu_columns import MOST_OF_NARROW, MOST_TOKENS, NARROW, tall_linear
from ffsplit.kernels.dispatch import reference_only

TALL, NARROW_TALL, WIDE, SMALL = (700, 300), (1024, 128), (300, 700), (64, 16)


@pytest.fixture(autouse=True)
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the CPUs where it was measured."""
    monkeypatch.setattr(cpu_columns, "PAYS", True)


def weight(shape: tuple[int, int]) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


@pytest.mark.parametrize(
    ("shape", "most"), [(TALL, MOST_TOKENS), (NARROW_TALL, MOST_OF_NARROW), (WIDE, 0), (SMALL, 0)], ids=str
)
@torch.no_grad()
def test_few_tokens_of_tall_matrices(shape: tuple[int, int], most: int) -> None:
    assert (shape[1] <= NARROW) == (shape in (NARROW_TALL, SMALL))
    matrix = weight(shape)
    for tokens in (1, MOST_TOKENS, MOST_TOKENS + 1, MOST_OF_NARROW, MOST_OF_NARROW + 1):
        cache, x = DerivedCache(), torch.randn(tokens, shape[1])
        found = tall_linear(x.view(1, tokens, -1), matrix, cache)
        torch.testing.assert_close(found[0], linear(x, matrix), rtol=1e-4, atol=1e-4)
        assert cache.is_empty == (tokens > most)


@torch.no_grad()
def test_what_is_kept_is_counted_and_follows_the_weights() -> None:
    projection, x = LowRank(torch.randn(TALL), torch.randn(TALL[1], 64)), torch.randn(1, 64)
    gc.collect()  # what other tests have left is not to be freed in between
    room = decoded_room(x.device)
    projection(x)
    assert decoded_room(x.device) == room - projection.a.nbytes
    assert set(projection.state_dict()) == {"a", "b"}
    assert projection.a.is_contiguous()
    projection.a.mul_(2)
    with reference_only():
        wanted = projection(x)
    torch.testing.assert_close(projection(x), wanted, rtol=1e-4, atol=1e-4)
    assert copy.deepcopy(projection).derived.is_empty
    projection.to(torch.bfloat16)
    assert projection.derived.is_empty
    assert decoded_room(x.device) == room


@torch.no_grad()
def test_without_room_nothing_is_kept() -> None:
    set_decoded_limit(0)
    try:
        cache, matrix, x = DerivedCache(), weight(TALL), torch.randn(1, TALL[1])
        assert torch.equal(tall_linear(x, matrix, cache), linear(x, matrix))
        assert cache.is_empty
    finally:
        set_decoded_limit(None)


def test_gradients_and_other_dtypes_take_the_matrix_itself() -> None:
    matrix, x = weight(TALL), torch.randn(1, TALL[1], requires_grad=True)
    cache = DerivedCache()
    tall_linear(x, matrix, cache).sum().backward()
    assert x.grad is not None
    assert matrix.grad is not None
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float64):
            other: Tensor = matrix.to(dtype)
            assert tall_linear(x.to(dtype), other, cache).dtype == dtype
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert tall_linear(x, matrix, cache).dtype == torch.bfloat16
    plain = DerivedCache()
    with torch.no_grad(), reference_only():
        tall_linear(x, matrix, plain)
    assert plain.is_empty


@torch.no_grad()
def test_elsewhere_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_columns, "PAYS", False)
    cache, matrix, x = DerivedCache(), weight(TALL), torch.randn(1, TALL[1])
    assert torch.equal(tall_linear(x, matrix, cache), linear(x, matrix))
    assert cache.is_empty
