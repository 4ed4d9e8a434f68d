"""Tokens that skip an FFN: which ones, what they get, what is counted, and that one token alone gets the same."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import ModelError, RecipeError
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.skips import Skip, SkipSpec
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.registry import get_method, method_config
from tests.unit.test_assemble import D_MODEL, layer, output_error


def gated(data: LayerData, **settings: Any) -> SumFFN:
    config = method_config({"method": "skip-gate", "sparsity": 0.4, **settings})
    module = get_method("skip-gate").apply(data, config).requires_grad_(False)
    assert module.spec == get_method("skip-gate").plan(FFNShape.of(data.ffn), config)
    return module


def inputs(data: LayerData) -> Tensor:
    return torch.cat(list(data.inputs))


def loud_and_quiet() -> LayerData:
    """The first input decides how much the FFN gives; nothing else matters."""
    data = layer(gated=False, biased=False, tokens=400)
    object.__setattr__(data.ffn, "act", nn.ReLU())
    data.ffn.up.zero_()
    data.ffn.up[:, 0] = 1.0
    return data


@pytest.mark.parametrize("target", ["norm", "energy"])
def test_the_tokens_that_miss_least_skip(target: str) -> None:
    data = loud_and_quiet()
    module = gated(data, target=target, instead="zero")
    assert module.skip is not None
    x = inputs(data)
    works = module.skip.works(x)[:, 0]
    assert int((~works).sum()) == 160
    # A ReLU of the first input alone: negative ones give nothing.
    size = data.ffn(x).norm(dim=1)
    assert float(size[~works].max()) < float(size.quantile(0.6))
    assert float(module.skip.direction[0].abs()) > 0.97
    assert output_error(data, module) < 0.02


def test_the_constant_is_the_mean_of_the_tokens_that_skip_once_it_is_stored() -> None:
    """In bfloat16 the gate is another gate, and other tokens skip."""
    data = replace(layer(tokens=4000), dtype=torch.bfloat16)
    module = gated(data, instead="mean")
    assert module.skip is not None
    assert module.skip.constant is not None
    x = inputs(data)
    skipped = ~copy.deepcopy(module.skip).bfloat16().works(x)[:, 0]
    assert torch.equal(~module.skip.works(x)[:, 0], skipped)
    torch.testing.assert_close(module.skip.constant, data.ffn(x[skipped]).mean(0), rtol=1e-4, atol=1e-5)


def test_a_skipped_token_gets_what_was_stored() -> None:
    data = layer(tokens=400)
    x = inputs(data)
    for instead in ("mean", "zero"):
        module = gated(data, instead=instead)
        assert module.skip is not None
        skipped = ~module.skip.works(x)[:, 0]
        wanted = data.ffn(x[skipped]).mean(0) if instead == "mean" else torch.zeros(D_MODEL)
        torch.testing.assert_close(module(x[skipped]), wanted.expand(160, -1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module(x[~skipped]), data.ffn(x[~skipped]))


def test_the_mean_is_better_than_nothing_and_skipping_less_is_better() -> None:
    data = layer(tokens=400)
    errors = [output_error(data, gated(data, sparsity=s)) for s in (0.0, 0.2, 0.4, 0.8)]
    assert errors == sorted(errors)
    assert errors[0] < 1e-6 < errors[1]
    assert output_error(data, gated(data)) < output_error(data, gated(data, instead="zero"))


def test_an_ffn_without_any_output_can_be_gated() -> None:
    data = layer(biased=False)
    data.ffn.down.zero_()
    module = gated(data)
    assert not module(inputs(data)).any()
    assert bool(torch.isfinite(module.skip.direction).all())  # type: ignore[union-attr]


def test_one_token_alone_gets_the_same_and_really_skips() -> None:
    data = layer(tokens=100)
    module = gated(data)
    x = inputs(data)
    together = module(x)
    with torch.no_grad():
        alone = torch.cat([module(row[None]) for row in x])
        works = module.skip.works(x)[:, 0]  # type: ignore[union-attr]
        # Matrix products of one row and of many round differently; what is stored does not.
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
        assert torch.equal(alone[~works], together[~works])
        with patch.object(SumFFN, "_sum", side_effect=AssertionError("the FFN was computed")):
            skipping = x[~works][:1].reshape(1, 1, -1)
            assert torch.equal(module(skipping)[0], together[~works][:1])
            with pytest.raises(AssertionError, match="computed"):
                module(x[works][:1])
            with pytest.raises(AssertionError, match="computed"):
                module(x[~works][:2])


def test_one_token_in_a_graph_is_masked() -> None:
    module = gated(layer(tokens=100))
    x = torch.randn(1, 1, D_MODEL)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), module(x))
    x.requires_grad_(True)
    assert torch.autograd.grad(module(x).sum(), x)[0].shape == x.shape
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == module(torch.cat([x, x])).dtype


@pytest.mark.parametrize("constant", [True, False])
def test_structure(constant: bool) -> None:
    module = gated(layer(), instead="mean" if constant else "zero")
    spec = module.spec
    assert spec.parameters == sum(t.numel() for t in module.state_dict().values())
    assert spec.stored_bits(32) == 32 * spec.parameters
    dense = spec.model_copy(update={"skip": None})
    assert spec.macs == pytest.approx(0.6 * dense.macs + D_MODEL)
    assert not spec.is_one_dense_branch
    assert dense.is_one_dense_branch
    assert spec.describe() == f"{dense.describe()}, skipped by 40% of tokens"
    assert spec.terms() == (*dense.terms(), "skipped by 40% of tokens")
    assert SumSpec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ModelError, match="some tokens only"):
        module.to_weights()


def test_it_survives_a_reload_a_copy_and_a_cast() -> None:
    data = layer()
    module = gated(data)
    x = inputs(data)
    empty = SumFFN.empty(module.spec, nn.GELU(), torch.float32, "cpu")
    empty.load_state_dict(module.state_dict())
    assert torch.equal(empty(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert module(x[:0]).shape == (0, D_MODEL)


def test_a_skip_of_another_size_is_refused() -> None:
    with pytest.raises(ValidationError, match="skip has d_model 5"):
        SumSpec(d_model=4, skip=SkipSpec(d_model=5, sparsity=0.5))
    with pytest.raises(RecipeError, match="sparsity"):
        method_config({"method": "skip-gate", "sparsity": 1.0})


def test_a_dropped_ffn_may_be_skipped() -> None:
    skip = Skip(SkipSpec(d_model=3, sparsity=0.5), torch.tensor([1.0, 0, 0]), torch.zeros(1))
    module = SumFFN(3, bias=torch.ones(3), skip=skip)
    assert module(torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]])).tolist() == [[1, 1, 1], [0, 0, 0]]
    assert module.spec.describe() == "constant, skipped by 50% of tokens"
