"""Lookup tables as a term of the sum: what they compute, count and refuse, and how they are fitted."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ffsplit.calibrate.cache import Activations, TensorCache
from ffsplit.errors import BudgetError, ModelError
from ffsplit.ffn.lookup import Lookup, LookupSpec, projections
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.registry import get_method, method_config
from ffsplit.ops.lookup import buckets
from tests.unit.test_assemble import D_MODEL, layer, output_error


def fit(gated: bool = True, biased: bool = True, **settings: Any) -> tuple[SumFFN, float]:
    data = layer(gated=gated, biased=biased, tokens=400)
    config = method_config({"method": "lookup", "keep": 0.9, "hash_bits": 3, **settings})
    with torch.no_grad():
        module = get_method("lookup").apply(data, config)
        assert module.spec == get_method("lookup").plan(FFNShape.of(data.ffn), config)
        return module.requires_grad_(False), output_error(data, module)


def tables() -> Lookup:
    spec = LookupSpec(d_model=2, tables=2, bits=1)
    planes, offsets = torch.eye(2), torch.tensor([0.0, 1.0])
    return Lookup(spec, planes, offsets, torch.tensor([[1.0, 0], [2, 0], [0, 10], [0, 20]])).requires_grad_(False)


def test_rows_are_added_up() -> None:
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [1.0, 2.0]])
    wanted = torch.tensor([[1.0, 10.0], [2.0, 10.0], [2.0, 20.0]])
    assert torch.equal(tables()(x), wanted)
    assert torch.equal(tables()(x.view(1, 3, 2)), wanted.view(1, 3, 2))
    assert torch.equal(tables()(x[1]), wanted[1])
    assert tables()(x[:0]).shape == (0, 2)
    assert SumFFN(2, bias=torch.ones(2), lookup=tables())(x)[0].tolist() == [2.0, 11.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.tensor([[-1.0, 0.0], [1.0, 2.0]], dtype=dtype)
    out = copy.deepcopy(tables()).to(dtype)(x)
    assert out.dtype == dtype
    assert out.tolist() == [[1.0, 10.0], [2.0, 20.0]]


@pytest.mark.parametrize("planes", ["random", "pca"])
def test_tables_are_fitted_to_the_hashes_that_are_stored(planes: str) -> None:
    """In bfloat16 a plane is another plane: no token may fall into a bucket that was fitted to others."""
    data = replace(layer(tokens=2000), dtype=torch.bfloat16)
    config = method_config({"method": "lookup", "keep": 0.9, "hash_bits": 3, "planes": planes})
    module = get_method("lookup").apply(data, config)
    assert module.lookup is not None
    stored = copy.deepcopy(module.lookup).bfloat16()
    x = torch.cat(list(data.inputs))
    hashes = [buckets(projections(x, one.planes, one.offsets), 3) for one in (module.lookup, stored)]
    assert torch.equal(*hashes)


@pytest.mark.parametrize("heavy", [0, 8, None])
def test_what_is_stored_is_counted(heavy: int | None) -> None:
    module, _ = fit(heavy=heavy)
    spec = module.spec
    assert spec.lookup is not None
    assert spec.parameters == sum(t.numel() for t in module.state_dict().values())
    bare = spec.model_copy(update={"lookup": None})
    assert spec.macs - bare.macs == spec.lookup.tables * (3 + 1) * D_MODEL
    assert spec.stored_bits(32) == 32 * spec.parameters
    assert not spec.is_one_dense_branch
    assert "lookup tables of 8 rows" in spec.describe()
    assert SumSpec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ModelError, match="lookup tables"):
        module.to_weights()
    empty = SumFFN.empty(spec, nn.GELU(), torch.float32, "cpu")
    empty.load_state_dict(module.state_dict())
    x = torch.randn(5, D_MODEL)
    assert torch.equal(empty(x), module(x))


@pytest.mark.parametrize("planes", ["random", "pca"])
@pytest.mark.parametrize("gated", [True, False])
def test_tables_explain_something(planes: str, gated: bool) -> None:
    _, error = fit(gated, heavy=0, planes=planes)
    data = layer(gated=gated, tokens=400)
    y = data.ffn(torch.cat(list(data.inputs)))
    assert error < float((y - y.mean(0)).norm() / y.norm())


def test_more_rounds_less_shrinkage_and_more_tables_fit_closer() -> None:
    assert fit(shrink=0.0, rounds=4)[1] <= fit(shrink=0.0, rounds=1)[1]
    assert fit(shrink=0.0)[1] < fit(shrink=50.0)[1]
    assert fit(heavy=8, keep=0.9)[1] < fit(heavy=8, keep=0.6)[1]


def test_every_sign_splits_the_tokens_in_halves() -> None:
    data = layer(tokens=400)
    x = torch.cat(list(data.inputs))
    lookup = fit(heavy=0)[0].lookup
    assert lookup is not None
    share = (x @ lookup.planes.T > lookup.offsets).double().mean(0)
    torch.testing.assert_close(share, torch.full_like(share, 0.5), rtol=0, atol=0.01)


@pytest.mark.parametrize("heavy", [None, 0, 5, 0.3])
@pytest.mark.parametrize("down_bias", [True, False])
def test_the_smallest_keep_that_an_error_names_works(heavy: float | None, down_bias: bool) -> None:
    shape = FFNShape(16, 200, gated=True, down_bias=down_bias)

    def plan(keep: float) -> SumSpec:
        values = {"method": "lookup", "keep": keep, "heavy": heavy, "hash_bits": 4}
        return get_method("lookup").plan(shape, method_config(values))

    with pytest.raises(BudgetError, match="smallest reachable keep is") as refused:
        plan(0.001)
    named = float(str(refused.value).split("keep is ")[1].split()[0])
    spec = plan(named + 2e-4)
    assert spec.lookup is not None
    assert spec.parameters <= (named + 2e-4) * shape.parameters


def test_tables_of_another_size_are_refused() -> None:
    with pytest.raises(ValidationError, match="lookup has d_model 5"):
        SumSpec(d_model=4, lookup=LookupSpec(d_model=5, tables=1, bits=2))


def test_the_seed_decides() -> None:
    def planes(seed: int) -> Tensor:
        data = layer()
        data.seed = seed
        config = method_config({"method": "lookup", "keep": 0.9, "hash_bits": 3})
        made = get_method("lookup").apply(data, config).lookup
        assert made is not None
        return made.planes

    assert torch.equal(planes(1), planes(1))
    assert not torch.equal(planes(1), planes(2))


def test_tables_fit_the_corrected_targets() -> None:
    """What the residual stream's drift asks for is not taken back by the tables."""
    data = layer(tokens=400)
    shift = torch.linspace(-3, 3, D_MODEL)
    corrections = Activations(TensorCache(), "c")
    for chunk in data.inputs:
        corrections.append(shift.expand(len(chunk), -1))
    corrected = replace(data, corrections=corrections)
    config = method_config({"method": "lookup", "keep": 0.9, "hash_bits": 3, "heavy": 0, "shrink": 0.0})
    with torch.no_grad():
        wanted = data.ffn(torch.cat(list(data.inputs))) + shift
        found = get_method("lookup").apply(corrected, config)(torch.cat(list(data.inputs)))
    assert (found - wanted).mean(0).abs().max() < 0.05
