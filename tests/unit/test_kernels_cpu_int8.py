"""The int8 storage through oneDNN: the numbers of the exact product, and what is kept."""

from __future__ import annotations

import copy

import pytest
import torch

from ffsplit.ffn.projections import Int8Dynamic, Int8DynamicSpec
from ffsplit.kernels import cpu_int8
from ffsplit.kernels.dispatch import cpu_int8_takes, reference_only
from ffsplit.kernels.int8 import exact_product, round_rows

pytestmark = pytest.mark.skipif(not cpu_int8.AVAILABLE, reason="this CPU has no VNNI")


def stored(rows: int, columns: int) -> Int8Dynamic:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return Int8Dynamic.from_dense(weight, Int8DynamicSpec(shape=(rows, columns)), torch.float32)


def agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether these are of the same codes, but for inputs next to the middle between two of them."""
    return bool((found - wanted).norm() <= 6e-3 * wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(272, 256), (257, 263), (1, 65_536), (70_000, 1)])
@torch.no_grad()
def test_the_kernel_agrees_with_the_reference(rows: int, columns: int, dtype: torch.dtype) -> None:
    projection = stored(rows, columns)
    for tokens in ((1,), (3,), (2, 17), (0,), ()):
        x = torch.randn(*tokens, columns).to(dtype)
        with reference_only():
            wanted = projection(x)
        found = projection(x)
        assert found.dtype == wanted.dtype
        assert not x.numel() or agree(found, wanted)
    assert projection.derived.is_empty != cpu_int8.fits((rows, columns))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (33, 4096), (64, 100)])
def test_sums_are_exact_at_their_largest(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    signs = torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.int8) * 2 - 1
    codes, x = 127 * signs, 127 * signs[:3]
    torch.full((2**16,), float("nan"))  # freed at once: memory that is not written shows
    found = cpu_int8.product(x.view(torch.uint8) ^ 128, cpu_int8.int8_matrix(codes, torch.full((rows,), 0.5)))
    assert torch.equal(found, exact_product(x, codes) * 0.5)


@pytest.mark.skipif(not cpu_int8.FEW_AVAILABLE, reason="this torch has no fbgemm")
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (33, 4096), (64, 100), (1, 65_000)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_few_tokens_have_the_right_sums_at_their_largest(rows: int, columns: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    signs = torch.randint(0, 2, (max(rows, tokens), columns), generator=generator, dtype=torch.int8) * 2 - 1
    codes, x = 127 * signs[:rows], 127 * signs[:tokens]
    few = cpu_int8.few_int8_matrix([cpu_int8.Int8Parts(codes, torch.full((rows,), 0.5))])
    torch.testing.assert_close(cpu_int8.few_product(x.float(), few), exact_product(x, codes) * 0.5, rtol=1e-6, atol=0)


@pytest.mark.skipif(not cpu_int8.FEW_AVAILABLE, reason="this torch has no fbgemm")
@torch.no_grad()
def test_few_and_many_tokens_have_the_same_numbers() -> None:
    projection, x = stored(272, 256), torch.randn(cpu_int8.FEW + 1, 256)
    x[0], x[1] = 0, 1e-39
    for tokens in (1, 2, cpu_int8.FEW):
        assert agree(projection(x[:tokens]), projection(x)[:tokens])


@torch.no_grad()
def test_without_fbgemm_few_tokens_take_the_kernel_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another engine was chosen, or torch has it no longer."""
    projection, x = stored(272, 256), torch.randn(3, 256)
    wanted = projection(x)
    for name, value in (("takes_few", lambda tokens: False), ("FEW_AVAILABLE", False)):
        monkeypatch.setattr(cpu_int8, name, value)
        projection.derived.drop()
        assert agree(projection(x), wanted)
        assert not projection.derived.holds("cpu_int8_few", (projection.codes, projection.scale))
        monkeypatch.undo()
    engine = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = "onednn"
        assert not cpu_int8.takes_few(1)
    finally:
        torch.backends.quantized.engine = engine


@pytest.mark.parametrize("more", [0, 40])
@torch.no_grad()
def test_a_token_with_nan_or_inf_says_so_and_spoils_no_other(more: int) -> None:
    projection = stored(272, 256)
    x = torch.randn(3 + more, 256)
    clean = projection(x)
    x[1, 7], x[2, 9] = float("nan"), float("inf")
    found = projection(x)
    assert torch.equal(found[0], clean[0])
    assert not bool(found[1:3].isfinite().any())
    assert not bool(projection(x[1:2]).isfinite().any())
    assert not bool(projection(x[2:3]).isfinite().any())


@torch.no_grad()
def test_what_is_kept_follows_the_codes_and_is_no_state() -> None:
    projection = stored(272, 256)
    x = torch.randn(2, 256)
    before = projection(x)
    assert set(projection.state_dict()) == {"codes", "scale"}
    assert copy.deepcopy(projection).derived.is_empty
    projection.codes.neg_()
    assert torch.equal(projection(x), -before)
    projection.to(torch.bfloat16)
    assert projection.derived.is_empty


def test_gradients_float64_and_small_matrices_take_the_reference() -> None:
    projection = stored(272, 256)
    x = torch.randn(2, 256, requires_grad=True)
    assert not cpu_int8_takes(x, projection.codes)
    projection(x).sum().backward()
    torch.testing.assert_close(x.grad, projection.dense().sum(0).expand(2, -1))
    with torch.no_grad():
        assert cpu_int8_takes(x, projection.codes)
        assert not cpu_int8_takes(x.double(), projection.codes)
        assert not cpu_int8_takes(x[:, :8], stored(272, 8).codes)


def test_both_roundings_are_the_same_but_next_to_halves() -> None:
    x = torch.randn(64, 500)
    x[3], x[4, 7] = 0, 3e4
    before = x.clone()
    codes, scale = round_rows(x)
    moved, same = cpu_int8.round_rows(x)
    assert torch.equal(x, before)
    other = codes.int() != moved.int() - 128
    assert bool(((x / scale).frac().abs() - 0.5).abs()[other].lt(1e-4).all())
    assert torch.equal(scale[scale != 1], same[scale != 1])
    assert bool((moved[3] == 128).all())
    extremes = torch.tensor([[1.0, -1.0, 0.0], [1e-45, 0.0, -1e-45], [3e38, -3e38, 1e38]])
    assert cpu_int8.round_rows(extremes)[0].int().sub(128).abs().max() <= 127


def test_a_default_device_changes_nothing() -> None:
    projection, x = stored(272, 256), torch.randn(3, 256)
    wanted = projection(x)
    projection.derived.drop()
    with torch.device("meta"):
        assert torch.equal(projection(x), wanted)
