"""What a specification and the dense FFN refuse, count and print."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from ffsplit.ffn.projections import Packed
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN, dense_branch
from ffsplit.ffn.weights import FFNWeights
from ffsplit.ops.rounding import round_to_nearest

DENSE = {"kind": "dense", "shape": [6, 4]}
DOWN = {"kind": "dense", "shape": [4, 6]}
PACKED = {"kind": "packed", "shape": [6, 4], "bits": 4, "group": 4, "symmetric": False}


def spec(up: Any = DENSE, down: Any = DOWN, **changes: Any) -> dict[str, Any]:
    return {"d_model": 4, "branches": [{"up": up, "down": down}], "linear": None, "bias": False} | changes


def test_the_examples_are_valid() -> None:
    assert SumSpec.model_validate(spec()).neurons == 6
    assert SumSpec.model_validate(spec(up=PACKED)).parameters == 48


@pytest.mark.parametrize(
    "values",
    [
        spec(up=DENSE | {"kind": "sparse"}),
        spec(up=DENSE | {"shape": [6, -4]}),
        spec(up=DENSE | {"shape": [6]}),
        spec(up=DENSE | {"shape": [6, 4, 1]}),
        spec(up=DENSE | {"rank": 2}),
        spec(up={"kind": "low_rank", "shape": [6, 4]}),
        spec(up={"kind": "low_rank", "shape": [6, 4], "rank": -1}),
        spec(up=PACKED | {"bits": 0}),
        spec(up=PACKED | {"bits": 9}),
        spec(up=PACKED | {"group": 0}),
        spec(up=PACKED | {"bits": "many"}),
        spec(up=None),
        spec(d_model=0),
        spec(d_model=5),
        spec(bias="maybe"),
        spec(branches={"up": DENSE}),
        spec(linear={"kind": "dense", "shape": [4, 5]}),
        [],
        None,
    ],
    ids=str,
)
def test_a_tampered_value_is_refused(values: Any) -> None:
    with pytest.raises(ValidationError):
        SumSpec.model_validate(values)


def test_a_gate_bias_needs_a_gate() -> None:
    with pytest.raises(ValidationError, match="gate_bias"):
        SumSpec.model_validate(spec(branches=[{"up": DENSE, "down": DOWN, "gate_bias": True}]))


def test_a_spec_cannot_be_changed() -> None:
    frozen = SumSpec.model_validate(spec())
    with pytest.raises(ValidationError, match="frozen"):
        frozen.d_model = 5  # type: ignore[misc]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_a_shape_counts_like_the_weights(gated: bool, biased: bool) -> None:
    bias = torch.zeros(6) if biased else None
    ffn = FFNWeights(
        torch.zeros(6, 4),
        torch.zeros(4, 6),
        nn.ReLU(),
        gate=torch.zeros(6, 4) if gated else None,
        up_bias=bias,
        gate_bias=bias if gated else None,
        down_bias=torch.zeros(4) if biased else None,
    )
    shape = FFNShape.of(ffn)
    assert shape.parameters == ffn.n_parameters
    assert shape.weights == sum(tensor.numel() for tensor in ffn.tensors().values() if tensor.ndim == 2)
    assert shape.neuron_parameters == ffn.n_parameters - ffn.take(torch.arange(5)).n_parameters


def test_weights_map_changes_every_tensor_and_nothing_else() -> None:
    ffn = FFNWeights(torch.ones(6, 4), torch.ones(4, 6), nn.ReLU(), down_bias=torch.ones(4))
    doubled = ffn.map(lambda tensor: 2 * tensor)
    assert doubled.act is ffn.act
    assert set(doubled.tensors()) == set(ffn.tensors())
    assert all(bool((tensor == 2).all()) for tensor in doubled.tensors().values())


def test_printing_a_sum_shows_its_storages() -> None:
    codes, grid = round_to_nearest(torch.randn(6, 4), 3, 4)
    branch = dense_branch(FFNWeights(torch.ones(6, 4), torch.ones(4, 6), nn.ReLU()))
    branch.up = Packed.from_codes(codes, grid, bits=3, group=4)
    assert "6x4, bits=3, group=4" in repr(SumFFN(4, [branch]))
