"""The kernels over whole FFNs against float64 on the CPU."""

from __future__ import annotations

import copy
import os
import sys
from threading import Thread

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ffsplit.ffn.projections import Dense, Packed, Projection
from ffsplit.ffn.sum import Branch, SumFFN
from ffsplit.kernels import float8_ffn, low_bit
from ffsplit.ops.rounding import Grid, nearest_scale
from tests.gpu.memory import poison

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
# (d_model, [(neurons, bits), ...], group, activation, gated, biases, 8-bit scales, symmetric)
SUMS = [
    (256, [(384, 4)], 128, "silu", True, False, False, False),
    (576, [(128, 8), (1408, 4)], 64, "silu", True, True, False, False),
    (192, [(64, 16), (128, 4)], 64, "gelu", False, True, False, False),
    (256, [(128, 8), (256, 4)], 128, "gelu_new", True, False, False, True),
    (160, [(160, 8)], 32, "relu", True, False, False, False),
    (288, [(32, 4), (384, 4)], 32, "relu2", True, False, True, False),
    (256, [(64, 4), (448, 3)], 64, "silu", True, True, False, False),
    (512, [(128, 16), (128, 8), (320, 3), (256, 2)], 128, "silu", True, True, True, False),
    (320, [(192, 3)], 128, "gelu", False, False, False, True),
    (128, [(64, 2)], 64, "linear", True, False, False, False),
    # Dense branches or inputs that end within the first group that some warp works on.
    (1056, [(160, 16), (2016, 4)], 128, "gelu_new", False, False, True, False),
    (1056, [(160, 16), (2016, 4)], 128, "silu", True, False, True, False),
    (608, [(96, 16), (1376, 4)], 128, "silu", True, True, False, False),
    (352, [(480, 4), (224, 16)], 64, "silu", True, True, False, False),
    (288, [(96, 16), (352, 16), (416, 8), (160, 16)], 128, "gelu", False, True, False, True),
    (448, [(320, 16), (192, 3)], 128, "silu", True, False, False, False),
]


def matrix(rows: int, columns: int, bits: int, group: int, eight: bool, symmetric: bool) -> Projection:
    if bits == 16:
        return Dense(torch.randn(rows, columns) * columns**-0.5)
    groups = -(-columns // group)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    scale = ((torch.rand(rows, groups) + 0.5) * columns**-0.5 / 2 ** max(bits - 2, 0)).to(torch.float16)
    zero = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8)
    if symmetric:
        zero.fill_(2 ** (bits - 1))
    row_scale = scale.amax(1) * 1.01 if eight else None
    if row_scale is not None:
        scale = nearest_scale(scale.float(), row_scale)
    grid = Grid(scale, zero, group, row_scale)
    return Packed.from_codes(codes, grid, bits=bits, group=group, symmetric=symmetric)


def sum_of(case: tuple[int, list[tuple[int, int]], int, str, bool, bool, bool, bool], dtype: torch.dtype) -> SumFFN:
    d_model, parts, group, act, gated, biased, eight, symmetric = case
    branches = []
    for neurons, bits in parts:
        made = [matrix(*size, bits, group, eight, symmetric) for size in ((neurons, d_model), (d_model, neurons))]
        gate = matrix(neurons, d_model, bits, group, eight, symmetric) if gated else None
        biases = [torch.randn(neurons) * 0.1 if biased and wanted else None for wanted in (True, gated)]
        branches.append(Branch(ACT2FN[act], *made, gate, *biases))
    return SumFFN(d_model, branches, bias=torch.randn(d_model) if biased else None).to(dtype).eval()


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double().cpu() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("index", range(len(SUMS)))
@torch.no_grad()
def test_few_tokens(index: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ffn = sum_of(SUMS[index], dtype)
    launched = []
    call = low_bit.LowBitFFN.__call__
    monkeypatch.setattr(low_bit.LowBitFFN, "__call__", lambda self, x: launched.append(1) or call(self, x))
    on_gpu = copy.deepcopy(ffn).cuda()
    for tokens in ((1, 7, 8), (9, 16, 17), (24, 31, 32))[index % 3]:
        launched.clear()
        x = torch.randn(tokens, ffn.d_model).to(dtype)
        exact = ffn.double()(x.double())
        ffn.to(dtype)
        poison()
        found = on_gpu(x.cuda())
        assert found.dtype == dtype
        assert relative_error(found, exact) < (8e-3 if dtype == torch.bfloat16 else 1e-3)
        poison()
        assert torch.equal(found, on_gpu(x.cuda()))  # sums are added up in one order
        assert launched


# Tokens, and blocks of both kernels: of twice the rows, and of warps that share tokens.
BLOCKS = [
    (5, low_bit.Block(2, 1, 2, 12288), low_bit.Block(4, 1, 2, 20480)),
    (5, low_bit.Block(4, 1, 2, 16384), low_bit.Block(8, 2, 1, 8192)),
    (3, low_bit.Block(4, 1, 1, 16384), low_bit.Block(16, 2, 2, 12288)),
    (13, low_bit.Block(4, 2, 2, 24576), low_bit.Block(4, 1, 2, 20480)),
    (13, low_bit.Block(8, 4, 1, 12288), low_bit.Block(4, 2, 2, 20480)),
    (29, low_bit.Block(2, 2, 2, 24576), low_bit.Block(8, 1, 1, 20480)),
    (29, low_bit.Block(4, 4, 1, 20480), low_bit.Block(8, 8, 1, 20480)),
    (32, low_bit.Block(4, 2, 1, 18432), low_bit.Block(16, 4, 1, 12288)),
]


@pytest.mark.parametrize(("tokens", "inner", "outer"), BLOCKS)
@pytest.mark.parametrize("index", [0, 1, 5, 6, 8, 12])
@torch.no_grad()
def test_blocks_of_many_rows(
    index: int, tokens: int, inner: low_bit.Block, outer: low_bit.Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layouts that only large FFNs get, on small ones that end anywhere."""
    tiles = 1 if tokens <= 8 else 2 if tokens <= 16 else 4
    monkeypatch.setattr(low_bit.Layout, "of", lambda *_: low_bit.Layout(tiles, inner, outer))
    ffn = sum_of(SUMS[index], torch.bfloat16)
    x = torch.randn(tokens, ffn.d_model).to(torch.bfloat16)
    on_gpu = copy.deepcopy(ffn).cuda()
    exact = ffn.double()(x.double())
    poison()
    found = on_gpu(x.cuda())
    assert relative_error(found, exact) < 8e-3
    assert all(torch.equal(found, on_gpu(x.cuda())) for _ in range(3))


SIZES = [*((torch.bfloat16, size) for size in (1e-6, 3e3, 1e8)), (torch.float16, 1e-2), (torch.float16, 10)]


@pytest.mark.parametrize(("dtype", "size"), SIZES, ids=str)
@pytest.mark.parametrize("tokens", [5, 13, 29])
@pytest.mark.parametrize("index", [1, 3])
@torch.no_grad()
def test_small_and_large_inputs(index: int, tokens: int, dtype: torch.dtype, size: float) -> None:
    """Codes are the smallest halves there are, and tokens are lifted for them: in this range neither leaves a trace."""
    ffn = sum_of(SUMS[index], dtype)
    x = (torch.randn(tokens, ffn.d_model) * size).to(dtype)
    x[1] = 0
    exact = copy.deepcopy(ffn).double()(x.double())
    found = ffn.cuda()(x.cuda()).cpu()
    assert bool(found.isfinite().all())
    assert float((found.double() - exact).norm()) < (8e-3 if dtype == torch.bfloat16 else 1e-3) * float(exact.norm())


@pytest.mark.parametrize("tokens", [3, 13])
@torch.no_grad()
def test_what_is_no_number_stays_none(tokens: int) -> None:
    ffn = sum_of(SUMS[1], torch.bfloat16).cuda()
    x = torch.randn(tokens, ffn.d_model, device="cuda", dtype=torch.bfloat16)
    x[1, 5] = float("nan")
    x[2, 7] = float("inf")
    found = ffn(x)
    assert not bool(found[1:3].isfinite().any())
    assert bool(found[0].isfinite().all())


@pytest.mark.parametrize("tokens", [3, 13])
@torch.no_grad()
def test_a_launch_that_starts_early_waits_for_its_inputs_and_weights(tokens: int) -> None:
    """In a graph behind copies and behind kernels, and with weights that were written just before."""
    ffn = sum_of(SUMS[1], torch.bfloat16).cuda()
    x = torch.randn(tokens, ffn.d_model, device="cuda", dtype=torch.bfloat16)
    codes = ffn._branches()[0].up.codes
    new, old = torch.randint_like(codes, 256), codes.clone()
    expected_old = ffn(x)
    codes.copy_(new)
    expected_new = ffn(x)
    assert not torch.equal(expected_old, expected_new)
    place = torch.empty_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        place.copy_(x)
        found = [ffn(place)]
        for written in (old, new, old):
            codes.copy_(written)
            found.append(ffn(place))
            codes.bitwise_xor_(0)
            found.append(ffn(place + 0))
    for _ in range(20):
        codes.copy_(new)
        place.zero_()
        graph.replay()
        expected = [expected_new, *(e for e in (expected_old, expected_new, expected_old) for _ in range(2))]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_shapes_of_inputs() -> None:
    ffn = sum_of(SUMS[1], torch.bfloat16).cuda()
    x = torch.randn(2, 3, 2 * 576, device="cuda", dtype=torch.bfloat16)[..., ::2]  # not contiguous
    torch.testing.assert_close(ffn(x), ffn(x.contiguous().view(6, 576)).view(2, 3, 576), rtol=0, atol=0)
    assert ffn(x[:0]).shape == (0, 3, 576)


@torch.no_grad()
def test_a_thread_that_has_called_nothing_yet() -> None:
    ffn = sum_of(SUMS[1], torch.bfloat16).cuda()
    x, found = torch.randn(3, 576, device="cuda", dtype=torch.bfloat16), []
    expected = ffn(x)

    def work() -> None:
        with torch.no_grad():
            found.append(ffn(x))

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


def test_gradients_take_the_plain_path() -> None:
    ffn = sum_of(SUMS[1], torch.bfloat16).cuda()
    x = torch.randn(3, 576, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = ffn(x)
    out.float().square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    with torch.no_grad():
        assert relative_error(ffn(x), out.detach().double().cpu()) < 1e-2


@torch.no_grad()
def test_a_captured_graph_replays_it() -> None:
    ffn = sum_of(SUMS[1], torch.bfloat16).cuda()
    x = torch.randn(3, 576, device="cuda", dtype=torch.bfloat16)
    ffn(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ffn(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, ffn(x))


@pytest.mark.skipif(sys.platform == "win32", reason="inductor")
@torch.no_grad()
def test_a_compiled_sum_calls_the_operator() -> None:
    ffn = sum_of(SUMS[1], torch.bfloat16).cuda()
    x = torch.randn(3, 576, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(ffn, fullgraph=True, backend=os.environ.get("FFSPLIT_TEST_BACKEND", "aot_eager"))
    torch.testing.assert_close(compiled(x), ffn(x), rtol=0, atol=0)


@torch.no_grad()
def test_many_tokens_are_exact_unless_float8_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ffn = sum_of(SUMS[1], torch.bfloat16)
    x = torch.randn(200, 576).to(torch.bfloat16)
    exact = ffn.double()(x.double())
    on_gpu = ffn.to(torch.bfloat16).cuda()
    assert relative_error(on_gpu(x.cuda()), exact) < 8e-3
    monkeypatch.setattr(float8_ffn._Mode, "prefill", "float8")
    poison()
    rounded = relative_error(on_gpu(x.cuda()), exact)
    assert 8e-3 < rounded < 8e-2
    assert not on_gpu._fused.derived.is_empty
    on_gpu.branches[0].up.codes.zero_()
    changed = copy.deepcopy(on_gpu).cpu().double()(x.double())
    assert relative_error(on_gpu(x.cuda()), changed) < 8e-2


@torch.no_grad()
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-36, 1e-35])
def test_a_row_next_to_nothing_becomes_no_nan_in_float8(size: float) -> None:
    x = torch.randn(4, 64).to(torch.bfloat16)
    x[1] = size
    made = float8_ffn.rounded(x.cuda(), 64)
    assert made is not None
    found = made.codes.float() * made.scale[:, None]
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found[1].cpu(), x[1].float(), rtol=0.1, atol=1e-39)


def test_other_modules_are_left_alone() -> None:
    act = nn.Softplus()
    branch = Branch(act, matrix(64, 64, 4, 64, False, False), matrix(64, 64, 4, 64, False, False))
    ffn = SumFFN(64, [branch]).to(torch.bfloat16).eval()
    x = torch.randn(5, 64).to(torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(ffn).cuda()(x.cuda()).cpu(), ffn(x), rtol=3e-2, atol=3e-2)
