"""Which sums the kernels over whole FFNs take, and what they are told of them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.activations import ACT2FN

from ffsplit.ffn.activated import activation_name
from ffsplit.ffn.fused import FusedBranches, _decoded, _places, low_bit_shapes
from ffsplit.ffn.projections import Dense, Packed, Projection
from ffsplit.ffn.sum import Branch, SumFFN
from ffsplit.kernels import nvrtc
from ffsplit.kernels.activations import ACTIVATIONS
from ffsplit.kernels.cache import decoded_room, is_capturing, set_decoded_limit
from ffsplit.kernels.dispatch import belong, takes_kernels
from ffsplit.kernels.float8_ffn import set_prefill
from ffsplit.kernels.low_bit import ALIGNMENT, TOKENS, Layout, LowBitFFN, LowBitShape, low_bit_ffn, takes
from ffsplit.ops.rounding import Grid


def packed(rows: int, columns: int, bits: int, group: int = 64) -> Packed:
    groups = -(-columns // group)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8)
    grid = Grid(torch.rand(rows, groups).to(torch.float16) + 0.5, zero, group)
    return Packed.from_codes(codes, grid, bits=bits, group=group)


def branch(neurons: int, bits: int, act: nn.Module | None = None, d_model: int = 64, gated: bool = True) -> Branch:
    def stored(rows: int, columns: int) -> Projection:
        return Dense(torch.randn(rows, columns)) if bits == 16 else packed(rows, columns, bits)

    gate = stored(neurons, d_model) if gated else None
    return Branch(act or nn.SiLU(), stored(neurons, d_model), stored(d_model, neurons), gate)


@pytest.mark.parametrize(
    "name", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "relu2", "linear"]
)
def test_an_activation_has_the_name_of_what_it_computes(name: str) -> None:
    act = ACT2FN[name]
    found = activation_name(act)
    assert found in ACTIVATIONS
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(act(x), ACTIVATIONS[found](x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["quick_gelu", "mish", "gelu_python", "sigmoid"])
def test_other_activations_have_none(name: str) -> None:
    assert activation_name(ACT2FN[name]) is None
    assert low_bit_shapes([branch(64, 4, ACT2FN[name])]) is None


class Quick(nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        return input * torch.sigmoid(1.702 * input)


def test_what_has_a_forward_of_its_own_has_none() -> None:
    wrapped = nn.SiLU()
    wrapped.forward = lambda x: 2 * x  # type: ignore[method-assign, assignment]
    for act in (Quick(), wrapped):
        assert activation_name(act) is None
        assert low_bit_shapes([branch(64, 4, act)]) is None


def test_kernels_do_not_run_inside_transforms() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(takes_kernels(x, ()))
        return x

    x = torch.randn(3, 4)
    torch.func.vmap(look)(x)
    torch.func.jvp(look, (x,), (x,))
    with forward_ad.dual_level():
        look(forward_ad.make_dual(x, x))
    assert not any(seen)
    assert len(seen) == 3
    assert takes_kernels(x, ())


def test_branches_go_two_at_a_time() -> None:
    found = low_bit_shapes([branch(64, 16), branch(128, 4), branch(192, 3)])
    assert found == (
        LowBitShape(64, (64, 128), (16, 4), 64, True, "silu"),
        LowBitShape(64, (192,), (3,), 64, True, "silu"),
    )
    assert [LowBitShape.from_numbers(shape.numbers()) for shape in found] == list(found)
    assert [found[0].padded(size) for size in found[0].neurons] == [64, 128]


def test_what_the_kernels_do_not_read() -> None:
    assert low_bit_shapes([branch(64, 16)]) is None  # dense: a matrix library is better
    assert low_bit_shapes([branch(72, 4)]) is None  # rows of down that start anywhere
    assert low_bit_shapes([branch(96, 3)]) is None
    assert low_bit_shapes([branch(64, 5)]) is None
    assert low_bit_shapes([branch(64, 4), branch(64, 4, gated=False)]) is None
    mixed = branch(64, 4)
    mixed.down = packed(64, 64, 8)
    assert low_bit_shapes([mixed]) is None
    mixed.down = packed(64, 64, 4, group=32)
    assert low_bit_shapes([mixed]) is None


def test_only_few_halves_on_a_gpu_are_taken() -> None:
    shape = LowBitShape(64, (64,), (4,), 64, True, "silu")
    assert not takes(torch.zeros(1, 64, dtype=torch.bfloat16), [shape])
    assert not takes(torch.zeros(1, 64, dtype=torch.bfloat16, device="meta"), [shape])


def test_few_tokens_of_matrices_that_can_be_counted_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))

    def taken(tokens: int, neurons: tuple[int, ...], gated: bool = True) -> bool:
        shape = LowBitShape(65536, neurons, (4,) * len(neurons), 64, gated, "silu")
        x = SimpleNamespace(  # stands for a tensor on a GPU, which there may be none of
            device=SimpleNamespace(type="cuda", index=0), dtype=torch.bfloat16, shape=(tokens, 65536),
            numel=lambda: 65536 * tokens,
        )  # fmt: skip
        return takes(x, [shape])  # type: ignore[arg-type]

    for neurons in ((64,), (64, 64)):
        assert [tokens for tokens in range(1, 40) if taken(tokens, neurons)] == list(range(1, 33))
        assert [tokens for tokens in range(1, 40) if taken(tokens, neurons, gated=False)] == list(range(1, 33))
    assert taken(1, (64, 32704))
    assert not taken(1, (64, 32768))  # 4 GiB in 16 bits


def test_a_replaced_projection_is_noticed_and_copies_start_anew() -> None:
    one = branch(64, 4)
    fused = FusedBranches()
    assert fused._found([one]).shapes == low_bit_shapes([one])
    one.up, one.gate, one.down = packed(64, 64, 8), packed(64, 64, 8), packed(64, 64, 8)
    (shape,) = fused._found([one]).shapes or ()
    assert shape.bits == (8,)
    whole = SumFFN(64, [one])
    whole._fused._found([one])
    for again in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert again._fused._branches == ()
        assert torch.equal(again(torch.ones(1, 64)), whole(torch.ones(1, 64)))


def test_decoded_branches_are_the_same_ffn() -> None:
    branches = [branch(64, 4), branch(128, 3)]
    for one in branches:
        for matrix in (one.up, one.gate, one.down):
            assert isinstance(matrix, Packed)
            matrix.scale.copy_((torch.rand(matrix.scale.shape) * 0.02).to(torch.float16).view(torch.int16))
    bias, x = torch.randn(64, dtype=torch.float64), torch.randn(3, 64, dtype=torch.float64)
    decoded = _decoded(branches, bias, "silu", torch.float64)
    expected = sum(one(x) for one in branches) + bias
    torch.testing.assert_close(decoded(x), expected)


def test_many_tokens_keep_one_decoded_ffn_for_every_dtype() -> None:
    branches, fused = [branch(64, 4), branch(128, 3)], FusedBranches()
    sources = [matrix.codes for one in branches for matrix in (one.up, one.down) if isinstance(matrix, Packed)]

    def many(x: Tensor) -> Tensor | None:
        return fused._many(x, branches, sources, None, "silu")

    for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float32, 1e-4)):
        x = torch.randn(5, 64).to(dtype)
        found = many(x)
        assert found is not None
        assert found.dtype == dtype
        expected = sum(one(x.double()) for one in branches)
        assert float((found - expected).norm() / expected.norm()) < close
    with torch.autocast("cpu", torch.bfloat16):
        assert many(torch.randn(5, 64)) is None
    assert many(torch.randn(5, 64).double()) is None
    set_decoded_limit(0)
    try:
        assert FusedBranches()._many(torch.randn(5, 64), branches, sources, None, "silu") is None
    finally:
        set_decoded_limit(None)
    with torch.inference_mode():
        unseen = [branch(64, 4)]
        assert FusedBranches()._many(torch.randn(5, 64), unseen, [unseen[0].up.codes], None, "silu") is None


def test_the_operator_has_a_fake() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(3, 64, dtype=torch.bfloat16)
        shape = LowBitShape(64, (64,), (4,), 64, True, "silu")
        out: Tensor = torch.ops.ffsplit.low_bit_ffn(x, [None] * 15, shape.numbers())
    assert out.shape == x.shape
    assert out.dtype == x.dtype


def test_sources_belong_to_the_package() -> None:
    for name in ("low_bit", "float8_rows"):
        assert "__global__" in nvrtc.source(name)


def test_instances_are_those_of_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, tuple[int, ...]]] = []
    monkeypatch.setattr(
        nvrtc, "launcher", lambda name, kernel, arguments, device, shared=0: asked.append((name, kernel, arguments))
    )
    monkeypatch.setattr(nvrtc, "shared_memory", lambda device: 227 * 1024)
    LowBitFFN([None] * 29, LowBitShape(64, (64, 128), (8, 4), 64, True, "silu"), 9, torch.bfloat16, 0)
    LowBitFFN([None] * 15, LowBitShape(64, (64,), (3,), 128, False, "gelu"), 1, torch.float16, 0)
    assert [f"{name} {nvrtc.instance_of(kernel, arguments)}" for name, kernel, arguments in asked] == [
        "low_bit arrange<8,4,64,false>",
        "low_bit inner<8,4,64,2,1,true,false,8,2,1,12288,16>",
        "low_bit outer<8,4,64,2,false,16,1,1,12288,16>",
        "low_bit inner<0,3,128,1,2,false,true,8,1,2,8192,20>",
        "low_bit outer<0,3,128,1,true,16,1,1,12288,16>",
    ]


@pytest.mark.parametrize("room", [227, 163, 99, 48], ids=lambda kib: f"{kib} KiB")
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 32])
@pytest.mark.parametrize("d_model", [576, 4096, 8192])
@pytest.mark.parametrize("neurons", [(1536,), (28672,), (2816, 25856)], ids=str)
def test_layouts_fit_into_shared_memory(room: int, tokens: int, d_model: int, neurons: tuple[int, ...]) -> None:
    shape = LowBitShape(d_model, neurons, (4,) * len(neurons), 128, True, "silu")
    layout = Layout.of(tokens, shape, room * 1024)
    for block in (layout.inner, layout.outer):
        assert block.warps * block.shared <= room * 1024
        assert block.warps % block.across == 0
    assert layout.tiles * TOKENS >= tokens
    assert layout.inner.warps >= 2


def test_prefill_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="exact, float8"):
        set_prefill("int8")  # type: ignore[arg-type]


def many(fused: FusedBranches, one: Branch, x: Tensor) -> Tensor | None:
    """What the fused path for many tokens gives, on the CPU."""
    known = fused._found([one])
    sources = [None if place is None else place[0][place[1]] for place in known.tensors]
    assert known.shapes is not None
    return fused._many(x, [one], sources, None, known.shapes[0].act)


@torch.no_grad()
def test_the_decoded_ffn_follows_dtype_activation_and_moves() -> None:
    one, x = branch(64, 4), torch.randn(3, 64) / 1000
    whole = SumFFN(64, [one])
    for dtype in (torch.bfloat16, torch.float32):
        found = many(whole._fused, one, x.to(dtype))
        assert found is not None
        torch.testing.assert_close(found, one(x.to(dtype)), rtol=2e-2, atol=2e-2)
    one.act = nn.ReLU()
    found = many(whole._fused, one, x)
    assert found is not None
    torch.testing.assert_close(found, one(x))
    assert not whole._fused.derived.is_empty
    whole.to(torch.float16)  # changes no code, but a move to the CPU must give a GPU's memory back
    assert whole._fused.derived.is_empty


@torch.no_grad()
def test_float8_weights_are_not_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing, ran = True, []
    monkeypatch.setattr("ffsplit.ffn.fused.wants_float8", lambda x, d_ff: True)
    monkeypatch.setattr("ffsplit.ffn.fused.run_float8", lambda x, made: ran.append(made) or x)
    monkeypatch.setattr("ffsplit.ffn.fused.is_capturing", lambda device: capturing)
    whole, x = SumFFN(64, [one := branch(64, 4)]), torch.randn(3, 64)
    found = many(whole._fused, one, x)
    assert not ran
    assert found is not None
    torch.testing.assert_close(found, one(x))
    capturing = False
    many(whole._fused, one, x)
    capturing = True
    many(whole._fused, one, x)
    assert len(ran) == 2
    assert ran[0] is ran[1]


def test_nothing_is_kept_that_a_captured_graph_would_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, capturing = torch.device("cuda", 0), True
    module = SimpleNamespace(is_current_stream_capturing=lambda: capturing)
    monkeypatch.setattr(torch, "get_device_module", lambda _device: module)
    set_decoded_limit(16)
    try:
        assert (is_capturing(gpu), decoded_room(gpu)) == (True, 0)
        assert not is_capturing(torch.device("cpu"))
        capturing = False
        assert (is_capturing(gpu), decoded_room(gpu)) == (False, 16)
    finally:
        set_decoded_limit(None)


def test_kernels_want_rows_one_after_another() -> None:
    one = branch(64, 4)
    tensors = [None if place is None else place[0][place[1]] for place in _places(one)]
    x = torch.randn(3, 64)
    assert belong(x, tensors)
    down = one.down
    assert isinstance(down, Packed)
    down.scale = torch.zeros(2, 64, dtype=torch.int16).T
    assert not belong(x, [*tensors, down.scale])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int]]]:
    """Kernels and their pointers, of launches that do nothing."""
    found: list[tuple[str, list[int]]] = []

    def launcher(name: str, kernel: str, arguments: tuple[int, ...], device: int, shared: int = 0) -> object:
        return lambda grid, block, pointers, integers, early=False: found.append((kernel, pointers))

    monkeypatch.setattr(nvrtc, "launcher", launcher)
    monkeypatch.setattr(nvrtc, "shared_memory", lambda device: 99 * 1024)
    return found


def test_inputs_that_start_anywhere_are_copied(launched: list[tuple[str, list[int]]]) -> None:
    shape = LowBitShape(64, (64,), (4,), 64, True, "silu")
    ffn = LowBitFFN([None] * 15, shape, 1, torch.bfloat16, 0)
    room = torch.zeros(256, dtype=torch.bfloat16)
    for start in (0, 1, 8):
        ffn(room[start : start + 64].view(1, 64))
    assert all(pointers[0] % ALIGNMENT == 0 for _, pointers in launched[::2])
    assert launched[0][1][0] == room.data_ptr()


@pytest.mark.parametrize(("tokens", "launches", "rows"), [(8, 2, 8), (9, 3, 16), (17, 3, 32), (32, 3, 32)])
def test_more_than_a_tile_is_put_in_order_first_and_read_whole(
    tokens: int, launches: int, rows: int, launched: list[tuple[str, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of threads read all tokens of their tiles, those behind the last one too."""
    sizes: list[int] = []

    def new_empty(tensor: Tensor, size: int) -> Tensor:
        sizes.append(size)
        return torch.empty(size, dtype=tensor.dtype)

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    shape = LowBitShape(192, (64, 192), (8, 4), 128, True, "silu")
    LowBitFFN([None] * 29, shape, tokens, torch.bfloat16, 0)(torch.zeros(tokens, 192, dtype=torch.bfloat16))
    assert [kernel for kernel, _ in launched] == ["arrange", "inner", "outer"][-launches:]
    # Whole groups: of hidden activations of both branches, and of the inputs once for each order.
    assert sizes == [rows * (128 + 256), *[rows * 2 * 256] * (launches == 3)]


class Driver:
    """Stands in for torch.cuda: which device is current, and what is launched there in which stream."""

    def __init__(self) -> None:
        self.current = 0
        self.launched: list[tuple[int, int]] = []

    def cuLaunchKernel(self, func: object, *rest: Any) -> int:
        self.launched.append((self.current, rest[-3].value))
        return 0

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.current = self.current, index
        yield
        self.current = before


def test_kernels_are_launched_on_their_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(torch.cuda._utils, "_get_gpu_runtime_library", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: driver.current)
    monkeypatch.setattr(torch.cuda, "device", driver.device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7 + driver.current))
    for device in (0, 1):
        nvrtc.Launcher(SimpleNamespace(func=None), device)((1, 1), 32, [1, 2], [3])
    assert driver.launched == [(0, 7), (1, 8)]
    assert driver.current == 0


def tensors_of(branches: list[Branch], bias: Tensor | None = None) -> list[Tensor | None]:
    places = [place for one in branches for place in _places(one)]
    return [*(None if place is None else place[0][place[1]] for place in places), bias]


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@torch.no_grad()
def test_the_operator_decodes_where_the_kernels_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, gated: bool
) -> None:
    monkeypatch.setattr(nvrtc, "launcher", lambda *_: None)
    monkeypatch.setattr(nvrtc, "shared_memory", lambda device: 99 * 1024)
    branches = [branch(64, 16, gated=gated), branch(128, 3, gated=gated)]
    for one in branches[1:]:
        for matrix in (one.up, one.gate, one.down):
            if isinstance(matrix, Packed):
                matrix.scale.copy_((torch.rand(matrix.scale.shape) * 0.02).to(torch.float16).view(torch.int16))
    (shape,) = low_bit_shapes(branches) or ()
    bias, x = torch.randn(64), torch.randn(2, 3, 64)
    found = low_bit_ffn._init_fn(x, tensors_of(branches, bias), shape.numbers())
    torch.testing.assert_close(found, SumFFN(64, branches, bias=bias)(x), rtol=1e-4, atol=1e-4)


def test_the_operator_copies_weights_that_start_anywhere(launched: list[tuple[str, list[int]]]) -> None:
    room = torch.zeros(64 * 64 + 8, dtype=torch.bfloat16)
    weights: list[Tensor | None] = [None] * 15
    weights[0] = weights[4] = weights[8] = room[1 : 1 + 64 * 64].view(64, 64)
    shape = LowBitShape(64, (64,), (16,), 64, True, "silu")
    low_bit_ffn._init_fn(torch.zeros(1, 64, dtype=torch.bfloat16), weights, shape.numbers())
    assert len(launched) == 2
    assert all(pointer % ALIGNMENT == 0 for _, pointers in launched for pointer in pointers)


def test_launches_are_kept_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[object] = []
    one = branch(64, 4)
    fused = FusedBranches()
    monkeypatch.setattr(fused, "_launch", lambda key, tensors, make: keys.append(key) or [])
    for device in ("cpu", "meta"):
        fused._few(torch.zeros(1, 64, dtype=torch.bfloat16, device=device), tensors_of([one]), None, [])
    assert keys[0] != keys[1]
