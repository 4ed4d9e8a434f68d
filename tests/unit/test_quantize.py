"""`quantize`: input scales, where they go, and that they pay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ffsplit.calibrate.cache import Activations, TensorCache
from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.sum import SumFFN
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods.quantize import QuantizeConfig, _folded, quantize, structure

D_MODEL, D_FF = 24, 48


def layer(act: nn.Module, *, gated: bool, seed: int = 0, dtype: torch.dtype = torch.float32) -> LayerData:
    """An FFN with biases; inputs and neurons of very different sizes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    sizes = torch.logspace(-1, 1, D_FF)[torch.randperm(D_FF, generator=generator)]
    up = random(D_FF, D_MODEL) / 5 * sizes[:, None]
    ffn = FFNWeights(
        up,
        random(D_MODEL, D_FF),
        act,
        random(D_FF, D_MODEL) / 5 if gated else None,
        random(D_FF),
        None,
        random(D_MODEL),
    )
    inputs = Activations(TensorCache(), "x-")
    for _ in range(4):
        inputs.append(random(40, D_MODEL) * torch.logspace(-1, 1, D_MODEL))
    return LayerData(ffn.map(lambda tensor: tensor.to(dtype)), inputs)


@torch.no_grad()
def error(data: LayerData, module: SumFFN) -> float:
    x = torch.cat(list(data.inputs))
    return float((module(x) - data.ffn(x)).norm() / data.ffn(x).norm())


def fitted(data: LayerData, **settings: Any) -> SumFFN:
    config = QuantizeConfig.model_validate({"code_bits": 3, "group": 16, **settings})
    module = quantize(data, config)
    assert module.spec == structure(FFNShape.of(data.ffn), config)
    return module


@pytest.mark.parametrize(
    ("act", "homogeneous"),
    [
        (nn.ReLU(), True),
        (nn.LeakyReLU(0.1), True),
        (nn.Identity(), True),
        (nn.GELU(), False),
        (nn.SiLU(), False),
        (nn.Tanh(), False),
        (nn.PReLU(), False),  # it is, but a plan has not read its parameter
    ],
    ids=lambda value: type(value).__name__,
)
def test_which_activations_scale_through(act: nn.Module, homogeneous: bool) -> None:
    ffn = layer(act, gated=False).ffn
    assert FFNShape.of(ffn).homogeneous == homogeneous
    with torch.device("meta"):
        assert FFNShape.of(ffn.map(lambda tensor: tensor.to("meta"))) == FFNShape.of(ffn)


@pytest.mark.parametrize(("act", "gated"), [(nn.SiLU(), True), (nn.ReLU(), False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_changes_no_bit_of_the_hidden_activations(act: nn.Module, gated: bool, dtype: torch.dtype) -> None:
    data = layer(act, gated=gated, dtype=dtype)
    config = QuantizeConfig(code_bits=2, group=16, rounding="awq")
    folded = _folded(data, structure(FFNShape.of(data.ffn), config).branches[0].down)
    assert not torch.equal(folded.ffn.up, data.ffn.up)
    x = next(iter(data.inputs)).to(dtype)
    factors = folded.ffn.up[:, 0] / data.ffn.up[:, 0]
    assert torch.equal(folded.ffn.hidden(x), data.ffn.hidden(x) * factors)
    assert torch.equal(folded.ffn.down * factors, data.ffn.down)


@pytest.mark.parametrize(
    ("act", "gated", "stored"), [(nn.SiLU(), True, False), (nn.ReLU(), False, False), (nn.GELU(), False, True)]
)
def test_scales_of_down_are_stored_only_where_they_cannot_be_folded(act: nn.Module, gated: bool, stored: bool) -> None:
    branch = fitted(layer(act, gated=gated), rounding="awq").spec.branches[0]
    assert branch.up.input_scale  # type: ignore[union-attr]
    assert branch.down.input_scale == stored  # type: ignore[union-attr]


@pytest.mark.parametrize(("act", "gated"), [(nn.SiLU(), True), (nn.ReLU(), False), (nn.GELU(), False)])
def test_awq_beats_rounding_to_nearest_and_scales_help_gptq(act: nn.Module, gated: bool) -> None:
    data = layer(act, gated=gated)
    nearest = error(data, fitted(data, rounding="rtn"))
    assert error(data, fitted(data, rounding="awq", refit=False)) < 0.9 * nearest
    for polish in (0, 3):
        plain = error(data, fitted(data, polish=polish))
        assert error(data, fitted(data, polish=polish, scale_search=True)) < plain


def test_scales_need_data() -> None:
    with pytest.raises(ValidationError, match="scale_search needs rounding"):
        QuantizeConfig(code_bits=3, rounding="rtn", scale_search=True)
    assert QuantizeConfig(code_bits=3, rounding="awq").needs_data
    assert not QuantizeConfig(code_bits=3, rounding="awq", scale_search=False).scaled
