"""Parts of the bench: caches, rotation, what a forward does, memory, peers. No test asserts how fast anything is."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ffsplit.bench import caches
from ffsplit.bench.caches import Flush, last_cache_bytes
from ffsplit.bench.costs import Side, ffn_timing
from ffsplit.bench.ffn import copies_needed, time_ffns
from ffsplit.bench.memory import extra_bytes, resident_bytes, stored_bytes
from ffsplit.bench.observe import Observation, observe
from ffsplit.bench.peer_linears import HalfLinear, Int4Linear, Int8DynamicLinear, int4_codes
from ffsplit.bench.peer_onnx import activation_name
from ffsplit.bench.peers import PEERS, PeerFFN, build_peers
from ffsplit.bench.roofline import Roofline, measure_roofline
from ffsplit.budget.cost import dense_spec
from ffsplit.ffn.made_up import fill
from ffsplit.ffn.merged import Watched
from ffsplit.ffn.merging import MergedSum, Product
from ffsplit.ffn.places import Held
from ffsplit.ffn.projections import Int8DynamicSpec, PackedSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.sum import SumFFN, dense_branch
from ffsplit.ffn.weights import FFNWeights
from ffsplit.kernels import cpu
from ffsplit.kernels.cache import DerivedCache
from ffsplit.methods.budgets import one_branch_spec

CPU = torch.device("cpu")
SHAPE = FFNShape(d_model=128, d_ff=256, gated=True)
ROOFLINE = Roofline(copy=1e9, read=5e8, gemm=1e12, call_seconds=1e-6, dtype="float32")


def dense(gated: bool = True) -> FFNWeights:
    torch.manual_seed(0)
    up, gate, down = torch.randn(256, 128), torch.randn(256, 128), torch.randn(128, 256)
    return FFNWeights(0.1 * up, 0.1 * down, nn.SiLU(), 0.1 * gate if gated else None, torch.randn(256), None, None)


def packed(bits: int = 4, scale_bits: int = 16) -> SumFFN:
    spec = one_branch_spec(SHAPE, lambda shape: PackedSpec(shape=shape, bits=bits, group=64, scale_bits=scale_bits))
    made = SumFFN.empty(spec, nn.SiLU(), torch.float32, CPU)
    fill(made)
    return made.requires_grad_(False).eval()


def ticking(step: float = 1.0):
    ticks = itertools.count()
    return lambda: step * next(ticks)


def test_the_largest_cache_is_the_last(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2048K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_cache_bytes(CPU, tmp_path) == 32 << 20
    assert last_cache_bytes(CPU, tmp_path / "nothing") == caches.UNKNOWN_BYTES


def test_a_flush_goes_through_the_whole_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "MOST_BYTES", 4096)
    flush = Flush(CPU)
    flush()
    assert flush._buffer.nbytes == 4096
    assert bool((flush._buffer == 1).all())


def test_copies_exceed_the_cache_and_stay_few(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(16, 16, bias=False)
    monkeypatch.setattr(caches, "MOST_BYTES", 5 * 16 * 16 * 4)
    assert copies_needed(module, torch.zeros(1, 16)) == 6
    assert copies_needed(module, torch.zeros(512, 16)) == 1
    monkeypatch.setattr(caches, "MOST_BYTES", 1 << 24)
    assert copies_needed(module, torch.zeros(1, 16)) == 64


def test_ffns_take_turns_on_a_clock_of_ones_own() -> None:
    flushed: list[int] = []
    modules = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}
    found = time_ffns(
        modules, torch.zeros(4, 8), rounds=3, warmup=1, clock=ticking(2.0), flush=lambda: flushed.append(1)
    )
    assert found == {"a": 2.0, "b": 2.0}
    assert len(flushed) == 8
    time_ffns(modules, torch.zeros(256, 8), rounds=1, warmup=0, clock=ticking(), flush=lambda: flushed.append(1))
    assert len(flushed) == 8, "many tokens are not timed with an emptied cache"


def test_the_roofline_is_bytes_and_operations_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "MOST_BYTES", 4096)
    monkeypatch.setattr("ffsplit.bench.roofline.GEMM_SIZE", {"cpu": 8})
    found = measure_roofline(CPU, torch.bfloat16, ticking(2.0))
    assert found == Roofline(copy=float(1 << 20), read=float(1 << 20), gemm=512.0, call_seconds=0.01, dtype="bfloat16")
    assert found.bound(1e9, 1) == "memory"
    assert found.bound(1, 1e9) == "compute"
    assert found.seconds(float(1 << 21), 0) == 2.0


@pytest.mark.parametrize("tokens", [1, 4])
def test_decoding_to_floats_is_seen(tokens: int) -> None:
    seen = observe(packed(), torch.randn(tokens, 128))
    assert seen.products
    plain = observe(SumFFN.empty(dense_spec(SHAPE), nn.SiLU(), torch.float32, CPU), torch.randn(tokens, 128))
    assert (plain.operations, len(plain.products), plain.decoded) == (5, 1, False)


def test_a_dense_matrix_made_in_between_is_decoding() -> None:
    class Decodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = packed().branches[0].up

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.packed.codes.float().repeat(1, 2) * 2.0).T

    assert observe(Decodes(), torch.randn(3, 128)).decoded


def test_products_with_kept_floats_are_seen() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = packed().branches[0].up
            self.floats = self.packed.dense().T

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.floats

    seen = observe(Keeps(), torch.randn(3, 128))
    assert (seen.decoded, seen.kept) == (False, True)


def test_what_kernels_derive_is_held() -> None:
    cache = DerivedCache()
    cache.get("decoded", [torch.zeros(1)], lambda: torch.zeros(100))
    module = nn.Linear(4, 4, bias=False)
    module.derived = cache  # type: ignore[assignment]
    assert resident_bytes(module) == 64 + 4 + 400


def test_what_a_sum_makes_of_all_its_branches_is_held() -> None:
    module = packed()
    before = resident_bytes(module)
    product = Product(torch.zeros(25), [25], (0,))
    module.merged._made[False] = Watched(
        (torch.float32, "highest", True), MergedSum((product,), (), (), 1), (), Held(), (), ((), ())
    )
    assert resident_bytes(module) == before + 100
    module._fused.derived.get("dense", [torch.zeros(1)], lambda: torch.zeros(50))
    assert resident_bytes(module) == before + 100 + 4 + 200
    module._thresholded.derived.get("neuron_major", [torch.zeros(1)], lambda: torch.zeros(10))
    assert resident_bytes(module) == before + 100 + 4 + 200 + 4 + 40


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_made_up_packed_weights_have_the_promised_size(bits: int, scale_bits: int) -> None:
    weight = packed(bits, scale_bits).branches[0].up.dense()
    assert 0.012 < float(weight.std()) < 0.03
    assert abs(float(weight.mean())) < 0.02
    assert bool(packed(bits, scale_bits)(torch.randn(2, 128)).isfinite().all())


def test_made_up_int8_weights_have_the_promised_size() -> None:
    spec = one_branch_spec(SHAPE, lambda shape: Int8DynamicSpec(shape=shape))
    made = SumFFN.empty(spec, nn.SiLU(), torch.float32, CPU)
    fill(made)
    assert 0.018 < float(made.branches[0].up.dense().std()) < 0.022


def test_held_memory_counts_what_kernels_keep_beside() -> None:
    module = nn.Linear(4, 4, bias=False)
    assert stored_bytes(module) == resident_bytes(module) == 64
    module.kept = {"repacked": [torch.zeros(8)]}  # type: ignore[assignment]
    module.view = module.weight.view(-1)
    assert stored_bytes(module) == 64
    assert resident_bytes(module) == 96


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_matrices_in_onednns_layout_are_held_too() -> None:
    module = nn.Linear(4, 4, bias=False)
    module.kept = torch.zeros(8, 8).to_mkldnn()
    assert resident_bytes(module) == 64 + 256


def test_memory_of_work_is_what_it_takes_beyond_before() -> None:
    # Straight from the system: an allocator may give memory that earlier tests freed and the process still has.
    extra = extra_bytes(lambda: np.frombuffer(mmap.mmap(-1, 128 << 20), dtype=np.uint8).fill(1), CPU)
    if extra is None:
        pytest.skip("this system does not tell")
    assert 100 << 20 < extra < 200 << 20


def test_memory_that_was_freed_and_is_taken_again_is_seen() -> None:
    def work() -> list[torch.Tensor]:
        return [torch.ones(1 << 18) for _ in range(64)]  # pieces small enough for the heap, 64 MiB together

    found = [extra_bytes(work, CPU) for _ in range(3)]
    if None in found or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this system does not tell, or its C library keeps what was freed")
    assert all(48 << 20 < extra < 96 << 20 for extra in found if extra is not None)


# Without integer dot products torch's int8 kernel adds in 16 bits, where large products are cut off.
INT8_ERROR = 0.5 if cpu.SATURATES else 0.03


@pytest.mark.parametrize(
    ("linear", "error"),
    [(HalfLinear, 0.01), (Int8DynamicLinear, INT8_ERROR), (Int4Linear, 0.2)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("gated", [False, True])
def test_peers_compute_the_dense_ffn(linear: type[nn.Module], error: float, gated: bool) -> None:
    ffn, x = dense(gated), torch.randn(5, 128)
    wanted = SumFFN(128, [dense_branch(ffn)])(x).detach()
    found = PeerFFN(ffn, linear)(x).detach()
    assert float((found - wanted).norm() / wanted.norm()) < error


def test_peers_that_cannot_run_say_why() -> None:
    built, missing = build_peers(dense(), CPU)
    assert set(built) | set(missing) == {peer.name for peer in PEERS}
    assert missing["torchao int4 g128"] == "runs on cuda"
    odd = FFNWeights(torch.randn(48, 32), torch.randn(32, 48), nn.SiLU())
    assert "no multiple of a group" in build_peers(odd, CPU)[1]["torch int4 g128"]


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "onnx and onnxruntime not installed" in build_peers(dense(), CPU)[1]["ONNX Runtime fp32"]


def test_onnx_runtime_computes_the_dense_ffn() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from ffsplit.bench.peer_onnx import dense_ffn, int4_ffn

    ffn, x = dense(), torch.randn(5, 128)
    wanted = SumFFN(128, [dense_branch(ffn)])(x).detach()
    torch.testing.assert_close(dense_ffn(ffn)(x), wanted, rtol=1e-4, atol=1e-4)
    assert float((int4_ffn(ffn)(x) - wanted).norm() / wanted.norm()) < 0.2


def test_activations_are_recognised_by_their_values() -> None:
    assert activation_name(nn.SiLU()) == "silu"
    assert activation_name(nn.GELU()) == "gelu"
    assert activation_name(nn.GELU(approximate="tanh")) == "gelu_tanh"
    with pytest.raises(ValueError, match="Tanh has no counterpart"):
        activation_name(nn.Tanh())


def test_int4_codes_are_within_half_a_step() -> None:
    weight = torch.randn(3, 256)
    codes, scale = int4_codes(weight)
    decoded = (codes.view(3, 2, 128) - 8) * scale[..., None]
    assert float((decoded.view(3, 256) - weight).abs().div(scale.repeat_interleave(128, 1)).max()) <= 0.5 + 1e-5
    assert int(codes.min()) >= 0
    assert int(codes.max()) <= 15


def test_an_ffns_least_time_is_that_of_its_bytes_or_its_products() -> None:
    seen = Observation(5, ("aten.mm",), decoded=False)
    full = Side(dense_spec(SHAPE), 4 * SHAPE.weights, 1, 4, seconds=1e-3, seen=seen)
    assert full.moved == 4 * SHAPE.weights + 4 * 2 * (128 + 2 * 256)
    assert full.macs == SHAPE.weights
    half = Side(packed().spec, SHAPE.weights // 2, 1, 4, seconds=2e-3, seen=Observation(20, ("aten.mm",), decoded=True))
    found = ffn_timing(full, half, ROOFLINE, {})
    assert found.speed == 0.5
    assert found.bound == "memory"
    assert found.roofline == pytest.approx(half.moved / 1e9 / 2e-3)
    assert found.verdict is not None
    assert "dequantisation" in found.verdict
    assert ffn_timing(full, None, ROOFLINE, {}).verdict is None
