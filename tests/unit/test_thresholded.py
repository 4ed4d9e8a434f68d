"""Sums under thresholds: which kernels take them, and that they compute what the plain path computes."""

from __future__ import annotations

import copy
import ctypes
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffsplit.ffn import thresholded
from ffsplit.ffn.places import tensors_at
from ffsplit.ffn.projections import Dense, LowRank
from ffsplit.ffn.selectors import Threshold, ThresholdSpec
from ffsplit.ffn.sum import Branch, SumFFN
from ffsplit.ffn.thresholded import _places, threshold_shape
from ffsplit.kernels import cpu_threshold, nvrtc
from ffsplit.kernels.cache import counted_transpose, set_decoded_limit
from ffsplit.kernels.dispatch import reference_only
from ffsplit.kernels.low_bit import ALIGNMENT
from ffsplit.kernels.threshold import (
    RUN,
    SLICE,
    ThresholdFFN,
    ThresholdShape,
    Workspace,
    shares_of,
    takes,
    threshold_ffn,
)

D_MODEL, NEURONS, HEAVY = 1024, 1100, 40
needs_vectors = pytest.mark.skipif(not cpu_threshold.AVAILABLE, reason="bags are not summed by vectors on this CPU")


@pytest.fixture(autouse=True)
def small_ones_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is worth it is a matter of time, and these shall take little."""
    monkeypatch.setattr(cpu_threshold, "SMALLEST", 2**20)


def branch(neurons: int, gated: bool, biased: bool, d_model: int = D_MODEL, act: nn.Module | None = None) -> Branch:
    def matrix(rows: int, columns: int) -> Dense:
        return Dense(torch.randn(rows, columns) * columns**-0.5)

    biases = (torch.randn(neurons) * 0.1, torch.randn(neurons) * 0.1 if gated else None) if biased else (None, None)
    gate = matrix(neurons, d_model) if gated else None
    return Branch(act or nn.SiLU(), matrix(neurons, d_model), matrix(d_model, neurons), gate, *biases)


def selector(neurons: int, level: float, shared: bool) -> Threshold:
    spec = ThresholdSpec(neurons=neurons, shared=shared, sparsity=0.5)
    return Threshold(spec, torch.full((1,), level) if shared else level * (0.8 + 0.4 * torch.rand(neurons)))


def ffn(gated: bool = True, biased: bool = True, heavy: int = 0, shared: bool = False, level: float = 0.2) -> SumFFN:
    """A frozen one in which about a third of the neurons works."""
    rest = branch(NEURONS, gated, biased)
    rest.selector = selector(NEURONS, level, shared)
    branches = [branch(heavy, gated, biased), rest] if heavy else [rest]
    made = SumFFN(D_MODEL, branches, bias=torch.randn(D_MODEL) if biased else None)
    return made.eval().requires_grad_(False)


def plain(module: SumFFN, x: Tensor) -> Tensor:
    with reference_only():
        return module(x)  # type: ignore[no-any-return]


def ran(module: SumFFN) -> bool:
    return not module._thresholded.derived.is_empty


@needs_vectors
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("gated", "biased", "heavy", "shared"),
    [(True, False, 0, True), (True, True, HEAVY, False), (False, True, 0, False), (False, False, HEAVY, True)],
)
def test_one_token_on_a_cpu(dtype: torch.dtype, gated: bool, biased: bool, heavy: int, shared: bool) -> None:
    module = ffn(gated, biased, heavy, shared).to(dtype)
    for shape in ((D_MODEL,), (1, 1, D_MODEL), (1, D_MODEL)):
        x = torch.randn(shape).to(dtype)
        found, wanted = module(x), plain(module, x)
        assert (found.shape, found.dtype) == (x.shape, dtype)
        close = 1e-5 if dtype == torch.float32 else 1e-2
        assert float((found - wanted).double().norm() / wanted.double().norm()) < close
        assert torch.equal(found, module(x))
    assert ran(module)


@needs_vectors
@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_and_of_working_neurons(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for level in (0.0, 0.05, 0.2, 2.0, 3.0, 99.0):  # all work, most, some, hardly any, none
            module, x = ffn(level=level), torch.randn(1, D_MODEL)
            torch.testing.assert_close(module(x), plain(module, x), rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@needs_vectors
def test_what_takes_the_plain_path() -> None:
    x = torch.randn(1, D_MODEL)
    module = ffn()
    module(torch.randn(2, D_MODEL))
    with reference_only():
        module(x)
    with torch.autocast("cpu", torch.bfloat16):
        module(x)
    module.double()(x.double())
    assert not ran(module)
    with pytest.raises(RuntimeError, match="shape"):
        ffn()(torch.randn(1, D_MODEL - 1))
    small = branch(8, True, False, 16)
    small.selector = selector(8, 0.1, True)
    tiny = SumFFN(16, [small]).requires_grad_(False)
    tiny(torch.randn(1, 16))
    assert not ran(tiny)
    set_decoded_limit(0)
    try:
        module = ffn()
        assert torch.equal(module(x), plain(module, x))
        assert not ran(module)
    finally:
        set_decoded_limit(None)


def test_gradients_are_those_of_the_plain_path() -> None:
    module, x = ffn(), torch.randn(1, D_MODEL, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)
    module.branches[0].down.weight.requires_grad_(True)
    module(x.detach()).square().sum().backward()
    assert module.branches[0].down.weight.grad is not None
    assert not ran(module)


@needs_vectors
@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.branches[0].down.weight.copy_(module.branches[0].down.weight.flip(0)),
        lambda module: module.branches[0].up.weight.mul_(2.0),
        lambda module: module.branches[0].selector.threshold.zero_(),
        lambda module: setattr(module.branches[0], "down", branch(NEURONS, True, False).down.requires_grad_(False)),
        lambda module: setattr(module.branches[0], "act", nn.ReLU()),
        lambda module: setattr(module.branches[0], "selector", None),
        lambda module: module.load_state_dict({name: -t for name, t in module.state_dict().items()}, assign=True),
    ],
)
@torch.no_grad()
def test_changes_are_noticed(change: Callable[[SumFFN], object]) -> None:
    module, x = ffn(), torch.randn(1, D_MODEL)
    before = module(x)
    assert ran(module)
    change(module)
    found = module(x)
    torch.testing.assert_close(found, plain(module, x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, before, rtol=1e-2, atol=1e-2)


@needs_vectors
def test_copies_pickles_and_moves_start_anew() -> None:
    module, x = ffn(), torch.randn(1, D_MODEL)
    found = module(x)
    assert set(module.state_dict()) == set(ffn().state_dict())
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert not ran(again)
        assert torch.equal(again(x), found)
    module.bfloat16()
    assert not ran(module)


def test_a_matrix_that_lies_neuron_after_neuron_is_not_copied() -> None:
    down = torch.randn(48, 32).t()
    assert counted_transpose(down).data_ptr() == down.data_ptr()
    copied = counted_transpose(down.contiguous())
    assert copied.is_contiguous()
    assert torch.equal(copied, down.t())


def test_which_sums_are_of_this_kind() -> None:
    found = threshold_shape(list(ffn(heavy=HEAVY)._branches()))
    assert found == ThresholdShape(D_MODEL, HEAVY, NEURONS, True, False, "silu")
    assert found.is_supported
    assert ThresholdShape.from_numbers(found.numbers()) == found
    rest = ffn()._branches()[0]
    assert threshold_shape([branch(8, True, False)]) is None
    assert threshold_shape([rest, rest]) is None
    assert threshold_shape([branch(8, False, False), rest]) is None
    assert threshold_shape([branch(8, True, False), branch(8, True, False), rest]) is None
    other = threshold_shape([branch(8, True, False, act=nn.ReLU()), rest])
    assert other is not None
    assert not other.is_supported  # the CPU does not mind
    rest.up = LowRank(torch.randn(NEURONS, 4), torch.randn(4, D_MODEL))
    assert threshold_shape([rest]) is None
    assert not ThresholdShape(60, 0, 8, True, True, "silu").is_supported


def test_only_few_halves_on_a_gpu_are_taken() -> None:
    shape = ThresholdShape(64, 0, 64, True, True, "silu")
    for device in ("cpu", "meta"):
        assert not takes(torch.zeros(1, 64, dtype=torch.bfloat16, device=device), shape)


@pytest.mark.parametrize("shape", [(4096, 0, 11008), (8192, 16, 28672), (72, 3, 34), (8, 0, 1)])
@pytest.mark.parametrize("tokens", [1, 2])
def test_the_workspace_holds_what_the_kernels_write(shape: tuple[int, int, int], tokens: int) -> None:
    ffn_shape = ThresholdShape(*shape, True, True, "silu")
    shares = shares_of(ffn_shape, tokens, 132)
    space, slices = Workspace.of(ffn_shape, tokens, shares), -(-shape[0] // SLICE)
    assert 1 <= shares <= -(-ffn_shape.neurons // RUN)
    assert space.partial >= 4 * slices
    assert space.partial % ALIGNMENT == space.hidden % ALIGNMENT == 0
    assert space.hidden - space.partial == 4 * shares * tokens * slices * SLICE
    assert space.size - space.hidden == 2 * tokens * ffn_shape.neurons


class Launches:
    """Stands in for compiled kernels: keeps what they are launched with, `inner` writes given hidden activations."""

    def __init__(self, hidden: Tensor | None = None) -> None:
        self.hidden = hidden
        self.asked: list[str] = []
        self.seen: list[tuple[str, tuple[int, int], list[int], list[int]]] = []

    def launcher(self, name: str, kernel: str, arguments: tuple[int, ...], device: int) -> Any:
        self.asked.append(f"{name} {nvrtc.instance_of(kernel, arguments)}")

        def launch(grid: tuple[int, int], block: int, pointers: list[int], integers: list[int]) -> None:
            self.seen.append((kernel, grid, pointers, integers))
            if kernel == "inner" and self.hidden is not None:
                ctypes.memmove(pointers[1], self.hidden.data_ptr(), self.hidden.nbytes)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    made = Launches()
    monkeypatch.setattr(nvrtc, "launcher", made.launcher)
    monkeypatch.setattr(nvrtc, "processors", lambda device: 132)
    return made


def test_kernels_are_told_of_every_tensor(launches: Launches) -> None:
    def pointers(gated: bool) -> list[list[int]]:
        tensors = [torch.empty(0) if at == -1 else torch.zeros(8) for at in range(12)]
        names = {tensor.data_ptr(): at for at, tensor in enumerate(tensors)}
        launches.seen.clear()
        shape = ThresholdShape(512, 3, 29, gated, True, "gelu")
        ThresholdFFN(tensors, shape, 2, torch.float16, 0)(torch.zeros(2, 512, dtype=torch.float16))
        return [[names[pointer] for pointer in seen[2] if pointer in names] for seen in launches.seen]

    # Heavy gate 0, its bias 1, up 2, its bias 3, down 4; rest 5 to 9; thresholds 10; bias of the sum 11.
    assert pointers(gated=True) == [[10, 0, 1, 2, 3, 5, 6, 7, 8], [4, 9, 11]]
    assert [seen[1] for seen in launches.seen] == [(4, 1), (2, 1)]
    assert [seen[3] for seen in launches.seen] == [[3, 29, 512, 1], [3, 29, 512]]
    assert pointers(gated=False) == [[10, 2, 3, 7, 8], [4, 9, 11]]
    assert launches.asked == [
        "threshold inner<2,true,true,2>",
        "threshold outer<true,2>",
        "threshold inner<2,false,true,2>",
        "threshold outer<true,2>",
    ]
    assert "__global__" in nvrtc.source("threshold")


def test_a_gpu_gets_launches_that_are_made_once(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholded, "cpu_takes", lambda x, shape: False)
    monkeypatch.setattr(thresholded, "takes", lambda x, shape: True)
    module = ffn(heavy=HEAVY).bfloat16()
    for tokens in (1, 2, 1, 2):
        assert module(torch.zeros(tokens, D_MODEL, dtype=torch.bfloat16)).shape == (tokens, D_MODEL)
    assert len(launches.asked) == 4
    assert len(launches.seen) == 8
    assert ran(module)
    module.branches[1].gate.weight.data = module.branches[1].gate.weight.data.clone()
    module(torch.zeros(1, D_MODEL, dtype=torch.bfloat16))
    assert len(launches.asked) == 6
    room = torch.zeros(D_MODEL + 8, dtype=torch.bfloat16)
    for start in (0, 1):
        module(room[start : start + D_MODEL])
        assert launches.seen[-2][2][0] % ALIGNMENT == 0
    before = len(launches.seen)
    module.float()(torch.zeros(1, D_MODEL))  # dtypes are looked at by `takes`, which stands aside here
    assert len(launches.seen) == before + 2
    module.branches[0].gate.weight.data = torch.zeros(HEAVY * D_MODEL + 1)[1:].view(HEAVY, D_MODEL)
    assert torch.equal(module(room[:D_MODEL].float()), plain(module, room[:D_MODEL].float()))
    assert len(launches.seen) == before + 2


@pytest.mark.parametrize("heavy", [0, 24])
@pytest.mark.parametrize("turned", [False, True])
def test_the_operator_multiplies_by_down_as_it_is_stored(launches: Launches, heavy: int, turned: bool) -> None:
    shape = ThresholdShape(64, heavy, 40, True, True, "silu")
    launches.hidden = torch.randn(2, heavy + 40).bfloat16()
    downs = [torch.randn(64, size).bfloat16() if size else None for size in (heavy, 40)]
    if turned:
        downs = [None if down is None else down.t().contiguous().t() for down in downs]
    weights = [torch.zeros(size, 64).bfloat16() if size else None for size in (heavy, 40)]
    bias = torch.randn(64).bfloat16()
    tensors: list[Tensor | None] = []
    for weight, down in zip(weights, downs, strict=True):
        tensors += [weight, None, weight, None, down]
    x = torch.zeros(2, 1, 64, dtype=torch.bfloat16)
    out = threshold_ffn._init_fn(x, [*tensors, torch.zeros(1).bfloat16(), bias], shape.numbers())
    assert out.shape == x.shape
    assert [seen[0] for seen in launches.seen] == (["inner", "outer"] if turned else ["inner"])
    if not turned:
        whole = torch.cat([down for down in downs if down is not None], 1)
        wanted = launches.hidden.double() @ whole.double().t() + bias
        torch.testing.assert_close(out[:, 0].double(), wanted, rtol=2e-2, atol=2e-1)


def test_the_operator_has_a_fake() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 2, 64, dtype=torch.bfloat16)
        shape = ThresholdShape(64, 0, 64, True, True, "silu")
        out: Tensor = torch.ops.ffsplit.threshold_ffn(x, [None] * 12, shape.numbers())
    assert (out.shape, out.dtype) == (x.shape, x.dtype)


def test_a_compiler_sees_the_operator(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Sequence[int]] = []

    def takes_here(x: Tensor, shape: ThresholdShape) -> bool:
        return x.shape[0] <= 4

    monkeypatch.setattr(thresholded, "takes", takes_here)
    monkeypatch.setattr(thresholded, "TRACED_DEVICES", ("cpu",))
    module = ffn(heavy=HEAVY).bfloat16()

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        called.extend(node.args[2] for node in graph.graph.nodes if "threshold_ffn" in str(node.target))
        return graph.forward

    with torch.no_grad():
        torch.compile(module, fullgraph=True, backend=backend)(torch.zeros(2, D_MODEL, dtype=torch.bfloat16))
    assert called == [[D_MODEL, HEAVY, NEURONS, 1, 0, 1]]


def test_on_a_cpu_a_compiler_sees_the_plain_path() -> None:
    module, x = ffn(), torch.randn(1, D_MODEL)
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), plain(module, x))
    assert not ran(module)


@pytest.mark.parametrize("heavy", [0, HEAVY], ids=["rest", "heavy"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@torch.no_grad()
def test_the_operator_masks_where_the_kernels_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, gated: bool, heavy: int
) -> None:
    monkeypatch.setattr(nvrtc, "launcher", lambda *_: None)
    monkeypatch.setattr(nvrtc, "processors", lambda device: 132)
    module, x = ffn(gated, heavy=heavy), torch.randn(2, 1, D_MODEL)
    branches = list(module._branches())
    shape = threshold_shape(branches)
    assert shape is not None
    tensors = [*tensors_at(_places(branches)), module.bias]
    found = threshold_ffn._init_fn(x, tensors, shape.numbers())
    torch.testing.assert_close(found, plain(module, x), rtol=1e-4, atol=1e-4)
