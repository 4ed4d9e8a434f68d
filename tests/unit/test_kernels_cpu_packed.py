"""Packed matrices through kernels of the CPU: against float64, the choice of the way, and what is kept."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffsplit.ffn.projections import Packed
from ffsplit.kernels import cache, cpu, cpu_int4
from ffsplit.kernels.dispatch import Path, packed_path, reference_only
from ffsplit.ops.rounding import round_to_nearest

ROUNDED = 6e-3
"""Of the output's norm: inputs, scales and outputs in bfloat16."""
needs_int4 = pytest.mark.skipif(not cpu_int4.AVAILABLE, reason="torch has no vectorised int4 kernel on this CPU")


def packed(bits: int, rows: int = 272, columns: int = 256, group: int = 64, **options: Any) -> Packed:
    generator = torch.Generator().manual_seed(bits + rows)
    weight = torch.randn(rows, columns, generator=generator) + 0.3
    scaled = options.pop("scaled", False)
    codes, grid = round_to_nearest(weight, bits, group, **options)
    inputs = (torch.rand(columns, generator=generator) + 0.5).half() if scaled else None
    return Packed.from_codes(
        codes, grid, bits=bits, group=group, symmetric=options.get("symmetric", False), input_scale=inputs
    )


def exact(stored: Packed, x: Tensor) -> Tensor:
    return x.double() @ stored.dense(torch.float64).T


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def path(stored: Packed, x: Tensor) -> Path:
    sources = (stored.codes, stored.scale, stored.zero)
    return packed_path(x, stored.spec.shape, bits=stored.spec.bits, group=stored.spec.group, sources=sources)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Freed memory full of NaN, so that an output that is not written shows."""
    torch.full((2**18,), float("nan"))
    yield
    cache.set_decoded_limit(None)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"scale_bits": 8}, {"scaled": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
@torch.no_grad()
def test_every_width_dtype_and_grid_agrees_with_float64(bits: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    stored = packed(bits, **options)
    for tokens in ((1,), (3,), (2, 4), (33,)):
        x = torch.randn(*tokens, 256).to(dtype)
        found = stored(x)
        assert found.dtype == dtype
        assert error(found, exact(stored, x)) < ROUNDED


@needs_int4
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 70),
    pieces=st.integers(1, 5),
    group=st.sampled_from([32, 64, 96, 128, 160, 256, 512, 10_000]),
    bits=st.integers(1, 8),
    tokens=st.integers(0, 9),
    seed=st.integers(0, 999),
)
def test_the_kernel_multiplies_by_the_decoded_matrix(
    rows: int, pieces: int, group: int, bits: int, tokens: int, seed: int
) -> None:
    columns = 32 * pieces
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    groups = -(-columns // group)
    scale = torch.rand(rows, groups, generator=generator) + 0.1
    zero = torch.randint(0, 2**bits, (rows, groups), generator=generator).float()
    made = cpu_int4.int4_matrix(cpu_int4.int4_parts(codes, scale, zero, bits=bits, group=group))
    x = torch.randn(tokens, columns, generator=generator)
    spread = torch.arange(columns) // group
    weight = (codes.double() - zero[:, spread]) * scale[:, spread]
    # Against the size of the terms: single outputs may cancel.
    size = x.abs().double() @ weight.abs().T + 1e-9
    assert bool(((cpu_int4.int4_linear(x, made) - x.double() @ weight.T).abs() < 0.012 * size).all())


@needs_int4
def test_few_tokens_take_the_kernel_and_many_the_decoded_matrix() -> None:
    four, eight = packed(4), packed(8)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            most = cpu_int4.most_tokens(4)
            assert path(four, torch.ones(2, most // 2, 256, dtype=dtype)) is Path.CPU_INT4
            assert path(four, torch.ones(most + 1, 256, dtype=dtype)) is Path.DECODED
        most = cpu_int4.most_tokens(8)
        assert path(eight, torch.ones(most, 256, dtype=torch.bfloat16)) is Path.CPU_INT4
        assert path(eight, torch.ones(most + 1, 256, dtype=torch.bfloat16)) is Path.DECODED
        assert path(eight, torch.ones(1, 256)) is Path.DECODED, "8 bits lose too much in bfloat16"
        assert path(four, torch.ones(1, 256, dtype=torch.float64)) is Path.REFERENCE
        assert path(four, torch.ones(0, 256)) is Path.REFERENCE
        assert path(packed(4, rows=16), torch.ones(1, 256)) is Path.REFERENCE, "too small to bother"
        assert path(packed(4, columns=250, group=50, rows=300), torch.ones(1, 250)) is Path.DECODED
        with reference_only():
            assert path(four, torch.ones(1, 256)) is Path.REFERENCE
    assert path(four, torch.ones(1, 256, requires_grad=True)) is Path.REFERENCE
    assert path(four, torch.ones(1, 256)) is Path.CPU_INT4


@needs_int4
def test_torchs_own_switch_lets_8_bits_in_float32_take_the_kernel() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert path(packed(8), torch.ones(1, 256)) is Path.CPU_INT4
    finally:
        torch.set_float32_matmul_precision(before)


def test_bfloat16_is_fast_with_tiles_and_on_amds() -> None:
    x86 = {"architecture": "x86_64", "avx512_bf16": True}
    assert cpu.slow_in_bfloat16(x86 | {"cpu_name": "Intel Xeon"})
    assert cpu.slow_in_bfloat16({"architecture": "x86_64"})
    assert not cpu.slow_in_bfloat16(x86 | {"cpu_name": "Intel Xeon", "amx_bf16": True})
    assert not cpu.slow_in_bfloat16(x86 | {"cpu_name": "AMD EPYC"})
    for unknown in ({"architecture": "aarch64"}, {}):
        assert not cpu.slow_in_bfloat16(unknown)
        assert not cpu.fast_in_bfloat16(unknown)


def test_a_slow_cpu_does_not_decide_for_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SLOW_BFLOAT16", True)
    for device, expected in (("cpu", torch.float32), ("meta", torch.bfloat16)):
        found = cpu.product_dtype(torch.empty(1, dtype=torch.bfloat16, device=device), may_round=False)
        assert found == expected


@pytest.mark.parametrize("speed", ["slow", "fast", "unknown"])
@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_the_product_is_right_in_the_dtype_that_is_fast(bits: int, speed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SLOW_BFLOAT16", speed == "slow")
    monkeypatch.setattr(cpu, "FAST_BFLOAT16", speed == "fast")
    stored = packed(bits)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(40, 256).to(dtype)
        found = stored(x)
        assert found.dtype == dtype
        rounded = speed == "fast" and (bits == 4 or dtype == torch.bfloat16)
        exactly = dtype == torch.float32 and not rounded
        assert error(found, exact(stored, x)) < (1e-5 if exactly else ROUNDED)
        wanted = torch.bfloat16 if rounded else torch.float32 if speed == "slow" else dtype
        assert stored.derived.holds((Path.DECODED, wanted), (stored.codes, stored.scale, stored.zero))


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(
    "change",
    [
        lambda stored: stored.scale.copy_(stored.scale.view(torch.float16).mul(2).view(torch.int16)),
        lambda stored: stored.codes.bitwise_not_(),
        lambda stored: setattr(stored, "codes", ~stored.codes),
        lambda stored: setattr(stored.codes, "data", ~stored.codes),
        lambda stored: stored.load_state_dict({n: t.flip(0) for n, t in stored.state_dict().items()}),
        lambda stored: stored.load_state_dict({n: t.flip(0) for n, t in stored.state_dict().items()}, assign=True),
        lambda stored: stored._apply(lambda t: t.flip(0)),
    ],
)
@torch.no_grad()
def test_what_is_kept_follows_what_is_stored(change: Any, tokens: int) -> None:
    stored = packed(4)
    x = torch.randn(tokens, 256)
    before = stored(x)
    assert not stored.derived.is_empty
    change(stored)
    found = stored(x)
    assert error(found, exact(stored, x)) < ROUNDED
    assert error(found, before.double()) > 0.1


@torch.no_grad()
def test_what_is_kept_is_made_once_and_is_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FAST_BFLOAT16", False)
    stored = packed(4)
    x = torch.randn(40, 256)
    names = set(stored.state_dict())
    first = stored(x)
    kept = stored.derived.get((Path.DECODED, torch.float32), (stored.codes, stored.scale, stored.zero), lambda: None)
    assert isinstance(kept, Tensor)
    assert set(stored.state_dict()) == names
    for other in (copy.deepcopy(stored), pickle.loads(pickle.dumps(stored))):
        assert other.derived.is_empty
        assert torch.equal(other(x), first)
    stored.to(torch.bfloat16)
    assert stored.derived.is_empty


@torch.no_grad()
def test_without_room_decoded_matrices_are_not_kept_and_the_numbers_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "FAST_BFLOAT16", False)
    x = torch.randn(40, 256)
    kept, not_kept = packed(4), packed(4)
    room = cache.decoded_room(torch.device("cpu"))
    found = kept(x)
    assert room - cache.decoded_room(torch.device("cpu")) == 4 * 272 * 256
    cache.set_decoded_limit(0)
    assert torch.equal(not_kept(x), found)
    assert not_kept.derived.is_empty
    kept.derived.drop()
    cache.set_decoded_limit(None)
    assert cache.decoded_room(torch.device("cpu")) == room
    with pytest.raises(ValueError, match="limit=-1"):
        cache.set_decoded_limit(-1)


@pytest.mark.parametrize("tokens", [1, 40])
def test_gradients_and_graphs_take_the_reference(tokens: int) -> None:
    stored = packed(4)
    x = torch.randn(tokens, 256, requires_grad=True)
    found = stored(x)
    torch.testing.assert_close(found, exact(stored, x).float(), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(gradient, stored.dense().sum(0).expand(tokens, -1), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.compiler.reset()
        compiled = torch.compile(stored, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, found.detach(), rtol=1e-4, atol=1e-4)
        program = torch.export.export(stored, (x.detach(),))
        assert not [node for node in program.graph.nodes if "int4pack" in str(node.target)]
        torch.testing.assert_close(program.module()(x.detach()), found.detach(), rtol=1e-4, atol=1e-4)
    assert stored.derived.is_empty


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_autocast_and_inference_mode(mode: Any, tokens: int) -> None:
    stored = packed(4)
    x = torch.randn(tokens, 256)
    with mode():
        assert error(stored(x), exact(stored, x)) < ROUNDED
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = stored(x)
        assert found.dtype == torch.bfloat16
        assert error(found, exact(stored, x)) < 2 * ROUNDED
        inner = copy.deepcopy(stored)  # made of inference tensors, whose changes nothing tells
        assert error(inner(x), exact(stored, x)) < ROUNDED
        assert inner.derived.is_empty == (mode is torch.inference_mode)


@torch.no_grad()
def test_inputs_with_any_strides() -> None:
    stored = packed(4)
    wide = torch.randn(256, 5)
    assert error(stored(wide.T), exact(stored, wide.T)) < ROUNDED
    assert error(stored(wide[:, 0]), exact(stored, wide[:, 0])) < ROUNDED
    assert stored(wide[:, 0]).shape == (272,)
