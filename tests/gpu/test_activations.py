"""All that lies between the matrices of an FFN in one pass on a GPU, against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ffsplit.ffn.activated import activated
from ffsplit.kernels.activations import ACTIVATIONS, activate, biased

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
ROUNDED = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


def halves(*shape: int, dtype: torch.dtype) -> Tensor:
    return 3 * torch.randn(*shape, device="cuda", dtype=dtype)


def exact(name: str, up: Tensor, gate: Tensor | None, up_bias: Tensor | None, gate_bias: Tensor | None) -> Tensor:
    act = ACTIVATIONS[name]
    up = biased(up.double(), up_bias)
    return act(up) if gate is None else act(biased(gate.double(), gate_bias)) * up


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", list(ROUNDED), ids=str)
@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize(("tokens", "neurons"), [(1, 8), (3, 3072), (257, 11008), (70_000, 16)])
@torch.no_grad()
def test_every_activation_with_and_without_gate_and_biases(
    name: str, tokens: int, neurons: int, dtype: torch.dtype
) -> None:
    for gated in (True, False):
        both = halves(tokens, 2 * neurons + 8, dtype=dtype)
        up, gate = both[:, :neurons], both[:, neurons + 8 :] if gated else None
        for bias in (True, False):
            biases = [halves(neurons, dtype=dtype) if bias and wanted else None for wanted in (True, gated)]
            wanted = exact(name, up, gate, *biases)
            found = activate(name, up, gate, *biases)
            if not gated and not bias and tokens == 1:
                assert found is None, "torch does it in one pass too"
                continue
            assert found is not None
            assert error(found, wanted) < ROUNDED[dtype]
            whole = torch.full((tokens, 2 * neurons), float("nan"), device="cuda", dtype=dtype)
            activate(name, up, gate, *biases, out=whole[:, neurons:])
            assert torch.equal(whole[:, neurons:], found)
            assert bool(whole[:, :neurons].isnan().all())


@torch.no_grad()
def test_batches_keep_their_shape_and_odd_rows_take_torchs_passes() -> None:
    up, gate = halves(2, 3, 64, dtype=torch.bfloat16), halves(2, 3, 64, dtype=torch.bfloat16)
    found = activate("silu", up, gate)
    assert found is not None
    assert found.shape == up.shape
    assert activate("silu", up[..., :60], gate[..., :60]) is None, "60 columns"
    assert activate("silu", up[..., 4:], gate[..., 4:]) is None, "rows that start between"
    assert activate("silu", up.float(), gate.float()) is None
    assert activate(None, up, gate) is None
    odd = activated(nn.SiLU(), up[..., :60], gate[..., :60])
    assert error(odd, exact("silu", up[..., :60], gate[..., :60], None, None)) < 8e-3


def test_gradients_are_recorded_and_hooks_run() -> None:
    up = halves(5, 64, dtype=torch.bfloat16).requires_grad_(True)
    gate, act = halves(5, 64, dtype=torch.bfloat16), copy.deepcopy(ACT2FN["silu"])
    activated(act, up, gate).sum().backward()
    assert up.grad is not None
    bias = halves(64, dtype=torch.bfloat16).requires_grad_(True)
    activated(act, gate, gate, bias).sum().backward()
    assert bias.grad is not None
    seen = []
    act.register_forward_hook(lambda *_: seen.append(True))
    with torch.no_grad():
        activated(act, gate, gate)
    assert seen


@torch.no_grad()
def test_nan_and_inf_are_passed_on() -> None:
    up = halves(3, 64, dtype=torch.bfloat16)
    up[1, 7], up[2, 9] = float("nan"), float("inf")
    for name in ACTIVATIONS:
        found, wanted = activate(name, up, up), exact(name, up, up, None, None)
        assert found is not None
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.isinf(), wanted.isinf())
