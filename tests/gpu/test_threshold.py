"""The kernels that leave out neurons under thresholds, against float64 on the CPU."""

from __future__ import annotations

import copy
import os
import sys

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from ffsplit.ffn.projections import Dense
from ffsplit.ffn.selectors import Threshold, ThresholdSpec
from ffsplit.ffn.sum import Branch, SumFFN
from ffsplit.kernels import threshold
from ffsplit.kernels.dispatch import reference_only
from tests.gpu.memory import poison

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
# (d_model, heavy, rest, activation, gated, biases, one threshold for all, size of the thresholds)
SUMS = [
    (256, 0, 384, "silu", True, False, True, 0.2),
    (72, 0, 37, "silu", True, True, False, 0.2),
    (520, 40, 333, "gelu", True, True, False, 0.15),
    (264, 8, 1300, "relu", False, True, True, 0.3),
    (2304, 0, 65, "gelu_new", True, False, True, 0.15),
    (4104, 3, 45, "linear", True, True, False, 0.6),
    (1288, 0, 9001, "relu2", True, False, False, 0.2),
    (8, 0, 1, "silu", True, True, True, 0.0),
    (4096, 0, 11008, "silu", True, False, True, 0.25),
    (128, 0, 200, "silu", True, True, True, 99.0),
]
NEAR = 0.01
"""An activation so close to its threshold may be on either side of it once rounded."""


def sum_of(case: tuple[int, int, int, str, bool, bool, bool, float], dtype: torch.dtype) -> SumFFN:
    d_model, heavy, rest, act, gated, biased, shared, level = case
    branches = []
    for neurons in (heavy, rest):
        up, gate = (torch.randn(neurons, d_model) * d_model**-0.5 for _ in range(2))
        down = torch.randn(d_model, neurons) * rest**-0.5
        biases = [torch.randn(neurons) * 0.1 if biased and wanted else None for wanted in (True, gated)]
        if neurons:
            branches.append(Branch(ACT2FN[act], Dense(up), Dense(down), Dense(gate) if gated else None, *biases))
    spec = ThresholdSpec(neurons=rest, shared=shared, sparsity=0.5)
    spread = torch.full((1,), level) if shared else level * (0.8 + 0.4 * torch.rand(rest))
    branches[-1].selector = Threshold(spec, spread)
    bias = torch.randn(d_model) if biased else None
    return SumFFN(d_model, branches, bias=bias).to(dtype).eval().requires_grad_(False)


def exact(ffn: SumFFN, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs in float64, and how far each may be off because of activations next to their thresholds."""
    wide, x = copy.deepcopy(ffn).double(), x.double()
    with reference_only():
        out = wide(x)
    rest = wide._branches()[-1]
    selector, rest.selector = rest.selector, None
    assert isinstance(selector, Threshold)
    up = rest.up(x) if rest.up_bias is None else rest.up(x) + rest.up_bias
    a = rest.act(up if rest.gate is None else rest.gate(x) if rest.gate_bias is None else rest.gate(x) + rest.gate_bias)
    near = (a.abs() - selector.threshold).abs() <= NEAR * selector.threshold
    return out, (rest.hidden(x) * near).abs() @ rest.down.weight.abs().t()


def far_off(found: Tensor, wanted: Tensor, slack: Tensor) -> float:
    """The error that activations next to their thresholds do not explain, relative to the outputs' norm."""
    error = ((found.double().cpu() - wanted).abs() - slack).clamp(min=0)
    return float(error.norm() / wanted.norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("index", range(len(SUMS)))
@torch.no_grad()
def test_few_tokens(index: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ffn = sum_of(SUMS[index], dtype)
    launched = []
    call = threshold.ThresholdFFN.__call__
    monkeypatch.setattr(threshold.ThresholdFFN, "__call__", lambda self, x: launched.append(1) or call(self, x))
    on_gpu = copy.deepcopy(ffn).cuda()
    for tokens in (1, 2):
        x = torch.randn(tokens, ffn.d_model).to(dtype)
        wanted, slack = exact(ffn, x)
        on_gpu(x.cuda())
        poison()
        found = on_gpu(x.cuda())
        assert found.dtype == dtype
        assert far_off(found, wanted, slack) < (8e-3 if dtype == torch.bfloat16 else 1e-3)
        assert all(torch.equal(found, on_gpu(x.cuda())) for _ in range(5))  # sums are added up in one order
    assert len(launched) == 2 * 7


@torch.no_grad()
def test_no_threshold_leaves_out_nothing() -> None:
    """Without neurons next to a threshold, the numbers themselves are compared."""
    for case in (SUMS[2], SUMS[6], SUMS[8]):
        ffn = sum_of(case, torch.bfloat16)
        selector = ffn._branches()[-1].selector
        assert isinstance(selector, Threshold)
        selector.threshold.fill_(-1.0)
        x = torch.randn(2, ffn.d_model).bfloat16()
        wanted, _ = exact(ffn, x)
        assert far_off(ffn.cuda()(x.cuda()), wanted, torch.zeros(())) < 8e-3


@torch.no_grad()
def test_decisions_are_those_of_the_plain_path() -> None:
    """Activations are rounded before they are compared, so only sums in another order decide otherwise."""
    ffn = sum_of(SUMS[8], torch.bfloat16).cuda()
    x = torch.randn(1, ffn.d_model, device="cuda", dtype=torch.bfloat16)
    with reference_only():
        plain = ffn(x)
    assert float((ffn(x) - plain).double().norm() / plain.double().norm()) < 1.5e-2


@torch.no_grad()
def test_shapes_of_inputs_and_what_is_kept() -> None:
    ffn = sum_of(SUMS[2], torch.bfloat16).cuda()
    x = torch.randn(2, 1, 2 * 520, device="cuda", dtype=torch.bfloat16)[..., ::2]  # not contiguous
    found = ffn(x)
    torch.testing.assert_close(found, ffn(x.contiguous().view(2, 520)).view(2, 1, 520), rtol=0, atol=0)
    assert ffn(x[:0]).shape == (0, 1, 520)
    assert not ffn._thresholded.derived.is_empty
    ffn.branches[1].down.weight.zero_()  # noticed
    ffn.branches[0].down.weight.zero_()
    torch.testing.assert_close(ffn(x), ffn.bias.expand_as(x), rtol=0, atol=0)
    many = torch.randn(9, 520, device="cuda", dtype=torch.bfloat16)
    assert ffn(many).shape == many.shape


def test_gradients_take_the_plain_path() -> None:
    ffn = sum_of(SUMS[2], torch.bfloat16).cuda()
    x = torch.randn(3, 520, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ffn(x).float().square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert ffn._thresholded.derived.is_empty


@torch.no_grad()
def test_a_captured_graph_replays_it() -> None:
    ffn = sum_of(SUMS[2], torch.bfloat16).cuda()
    x = torch.randn(3, 520, device="cuda", dtype=torch.bfloat16)
    ffn(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ffn(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, ffn(x))


@torch.no_grad()
def test_a_capture_makes_nothing_to_keep() -> None:
    ffn = sum_of(SUMS[2], torch.bfloat16).cuda()
    x = torch.randn(1, 520, device="cuda", dtype=torch.bfloat16)
    ffn(x.expand(9, -1))  # the plain path's libraries are loaded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ffn(x)
    assert ffn._thresholded.derived.is_empty
    wanted, slack = exact(copy.deepcopy(ffn).cpu(), x.cpu())
    assert far_off(ffn(x), wanted, slack) < 8e-3
    graph.replay()
    assert far_off(out, wanted, slack) < 2e-2


@pytest.mark.skipif(sys.platform == "win32", reason="inductor")
@pytest.mark.parametrize("turned", [False, True])
@torch.no_grad()
def test_a_compiled_sum_calls_the_operator(turned: bool) -> None:
    torch._dynamo.reset()
    ffn = sum_of(SUMS[2], torch.bfloat16)
    if turned:  # `down` neuron after neuron, so that the operator leaves out its rows too
        for branch in ffn._branches():
            branch.down.weight.data = branch.down.weight.data.t().contiguous().t()
    x = torch.randn(2, 520).bfloat16()
    wanted, slack = exact(ffn, x)
    compiled = torch.compile(ffn.cuda(), fullgraph=True, backend=os.environ.get("FFSPLIT_TEST_BACKEND", "aot_eager"))
    found = compiled(x.cuda())
    assert far_off(found, wanted, slack) < 8e-3
    if turned:
        assert torch.equal(found, ffn(x.cuda()))
