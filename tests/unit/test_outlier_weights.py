"""Codes with numbers on top of single weights: what is stored, that it is exact, and that it is worth it."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load, save
from torch import Tensor

from ffsplit.errors import RecipeError
from ffsplit.ffn.projections import OutlierWeights, OutlierWeightsSpec, Packed, PackedSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.budgets import packed_branch_spec
from ffsplit.methods.compressors import Rounding
from ffsplit.methods.registry import method_config
from ffsplit.ops.outliers import excess_of, extremes, weak_weights
from ffsplit.ops.refine import output_error
from ffsplit.ops.rounding import round_to_nearest

FLOAT32 = torch.float32
PLACES = (0, 20, 21, 84, 125)


def example(dtype: torch.dtype = FLOAT32) -> OutlierWeights:
    generator = torch.Generator().manual_seed(0)
    codes, grid = round_to_nearest(torch.randn(6, 21, generator=generator), 3, 8)
    packed = Packed.from_codes(codes, grid, bits=3, group=8)
    return OutlierWeights.at(packed, torch.tensor(PLACES), torch.randn(5, generator=generator).to(dtype))


def layer(rows: int = 32, columns: int = 64) -> tuple[Tensor, Tensor, list[int]]:
    """A weight with a few large entries, and the Gram of correlated inputs."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, columns, generator=generator, dtype=torch.float64)
    x = x + x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64) / 8
    weight = torch.randn(rows, columns, generator=generator)
    places = torch.randperm(rows * columns, generator=generator)[:20].sort().values
    weight.view(-1)[places] = 12 * weight.view(-1)[places].sign()
    return weight, x.T @ x, places.tolist()


def spec(outliers: int, rows: int = 32, columns: int = 64) -> OutlierWeightsSpec:
    packed = PackedSpec(shape=(rows, columns), bits=3, group=16)
    return OutlierWeightsSpec(shape=(rows, columns), packed=packed, outliers=outliers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_numbers_stand_on_top_of_the_codes(dtype: torch.dtype) -> None:
    stored = example()
    expected = stored.packed.dense(dtype).clone()
    expected.view(-1)[list(PLACES)] += stored.values.detach().to(dtype)
    assert torch.equal(stored.dense(dtype), expected)
    x = torch.randn(2, 3, 21, dtype=dtype)
    torch.testing.assert_close(stored(x), x @ expected.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_stored_is_what_is_counted(dtype: torch.dtype) -> None:
    stored = example(dtype)
    state = stored.state_dict()
    assert sum(8 * tensor.nbytes for tensor in state.values()) == stored.spec.stored_bits(8 * dtype.itemsize)
    fresh = OutlierWeights.empty(stored.spec, dtype, torch.device("cpu"))
    fresh.load_state_dict(load(save(state)))
    assert torch.equal(fresh.dense(), stored.dense())
    integers = {name: tensor for name, tensor in state.items() if not tensor.is_floating_point()}
    cast = copy.deepcopy(stored).to(torch.bfloat16).state_dict()
    assert all(torch.equal(cast[name], tensor) for name, tensor in integers.items())


def test_columns_beyond_the_signed_range_come_back() -> None:
    packed = Packed.empty(PackedSpec(shape=(2, 40_000), bits=2, group=40_000), FLOAT32, torch.device("cpu"))
    for tensor in packed.buffers():
        tensor.zero_()
    stored = OutlierWeights.at(packed, torch.tensor([39_999, 79_998]), torch.tensor([1.0, 2.0]))
    assert stored.dense().nonzero().tolist() == [[0, 39_999], [1, 39_998]]


def test_gradients_and_shapes_without_data() -> None:
    stored, x = example(), torch.randn(4, 21, requires_grad=True)
    on_x, on_values = torch.autograd.grad(stored(x).sum(), [x, stored.values])
    torch.testing.assert_close(on_x, stored.dense().detach().sum(0).expand(4, 21))
    torch.testing.assert_close(on_values, x.detach().sum(0)[[place % 21 for place in PLACES]])
    meta = OutlierWeights.empty(stored.spec, FLOAT32, torch.device("meta"))
    assert meta(torch.empty(2, 21, device="meta")).shape == (2, 6)


def test_what_sticks_out_is_taken_off() -> None:
    weight = torch.tensor([[1.0, 9.0, -1.0, 2.0, 5.0, -7.0], [0.5, 0.0, -0.5, 3.0, 3.0, 3.0]])
    places = torch.tensor([1, 4, 5, 7])
    assert excess_of(weight, places, 3).tolist() == [8.0, 3.0, -9.0, 0.0]
    assert excess_of(weight, torch.tensor([3, 4, 5]), 3).tolist() == [2.0, 5.0, -7.0]  # nothing left but zero
    assert excess_of(weight, torch.tensor([5]), 4).tolist() == [-12.0]  # a short group: 5 and -7


def test_the_farthest_weights_of_each_group() -> None:
    weight = torch.tensor([[1.0, 9.0, -1.0, 2.0, 5.0], [0.5, 0.0, -4.0, 3.0, 3.5]])
    assert extremes(weight, 3, 1).tolist() == [1, 3, 7, 8]
    assert extremes(weight, 3, 2).tolist() == [1, 2, 3, 4, 5, 7, 8, 9]
    assert extremes(weight, 5, 1).tolist() == [1, 7]
    assert extremes(weight, 1).tolist() == list(range(10))


@torch.no_grad()
def test_the_large_weights_are_found_and_help() -> None:
    weight, gram, places = layer()
    plain = PackedSpec(shape=(32, 64), bits=3, group=16)
    for how in ("gptq", "awq", "rtn"):
        rounding, seen = Rounding(how, polish=1), None if how == "rtn" else gram  # type: ignore[arg-type]
        kept = rounding(weight, spec(20), seen, FLOAT32)
        assert isinstance(kept, OutlierWeights)
        assert kept.spec == spec(20)
        found = torch.repeat_interleave(torch.arange(32), kept.counts) * 64 + kept.columns
        assert len({*found.tolist()} & {*places}) >= 18
        errors = [
            float(output_error(weight, rounding(weight, s, seen, FLOAT32).dense(), gram)) for s in (spec(20), plain)
        ]
        assert errors[0] < 0.5 * errors[1]


def test_the_weakest_weights_are_those_that_others_cannot_make_up_for() -> None:
    weight, rounded = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[0.9, 0.9, 0.8]])
    gram = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert weak_weights(weight, rounded, None, 1, 0.01).tolist() == [2]
    assert weak_weights(weight, rounded, gram, 1, 0.01).tolist() == [2]  # the first two stand in for each other
    assert weak_weights(weight, rounded, torch.diag(torch.tensor([9.0, 1.0, 1.0])), 1, 0.01).tolist() == [0]


def test_structures_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match="do not make"):
        OutlierWeightsSpec(shape=(6, 21), packed=PackedSpec(shape=(6, 20), bits=3, group=8), outliers=1)
    with pytest.raises(ValidationError, match="do not make"):
        spec(32 * 64 + 1)
    with pytest.raises(ValidationError, match="columns: places"):
        spec(1, 2, 70_000)
    with pytest.raises(RecipeError, match="either outliers"):
        method_config({"method": "quantize", "code_bits": 3, "outliers": 0.1, "outlier_weights": 0.1})


@pytest.mark.parametrize(("share", "counts"), [(0.0, (0, 0)), (1e-6, (1, 1)), (0.01, (26, 26))])
def test_a_share_of_the_weights_of_each_matrix(share: float, counts: tuple[int, int]) -> None:
    branch = packed_branch_spec(FFNShape(32, 80, gated=True), 80, 3, 16, outlier_weights=share)
    assert tuple(getattr(projection, "outliers", 0) for projection in (branch.up, branch.down)) == counts
