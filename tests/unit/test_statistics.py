from __future__ import annotations

import copy
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ffsplit.calibrate.cache import Activations, TensorCache
from ffsplit.calibrate.layer import LayerData
from ffsplit.calibrate.replay import rows_of
from ffsplit.calibrate.statistics import FFNStatistics, collect
from ffsplit.errors import DataError
from ffsplit.ffn.weights import FFNWeights

PER_SEQUENCE = {"sequences", "sequence_mean_square"}


def make_ffn(d_model: int = 5, d_ff: int = 9, *, gated: bool = True, bias: bool = True, seed: int = 0) -> FFNWeights:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return FFNWeights(
        up=random(d_ff, d_model),
        down=random(d_model, d_ff),
        act=nn.SiLU(),
        gate=random(d_ff, d_model) if gated else None,
        up_bias=random(d_ff) if bias else None,
        gate_bias=random(d_ff) if bias and gated else None,
    )


def make_inputs(*lengths: int, d_model: int = 5, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, d_model, generator=generator) for length in lengths]


def layer(ffn: FFNWeights, inputs: list[Tensor], **options: object) -> LayerData:
    store = Activations(TensorCache(), "in-")
    for chunk in inputs:
        store.append(chunk)
    return LayerData(ffn, store, "some.layer", **options)  # type: ignore[arg-type]


def assert_equal(found: FFNStatistics, expected: FFNStatistics, *, without: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    for field in fields(FFNStatistics):
        if field.name not in without:
            torch.testing.assert_close(
                getattr(found, field.name), getattr(expected, field.name), rtol=1e-6, atol=1e-6, msg=field.name
            )


@pytest.mark.parametrize("gated", [True, False])
def test_equal_to_a_direct_computation_in_float64(gated: bool) -> None:
    # In float64: how a float32 product rounds is the processor's matter, and sums that cancel show it.
    wide, inputs = make_ffn(gated=gated).map(lambda tensor: tensor.double()), make_inputs(7, 3, 12)
    found = collect(wide, inputs)
    x = torch.cat(inputs).double()
    h = wide.hidden(x)
    contribution = h.abs() * wide.down.norm(dim=0)
    expected = FFNStatistics(
        tokens=torch.tensor(22.0, dtype=torch.float64),
        sequences=torch.tensor(3.0, dtype=torch.float64),
        input_gram=x.T @ x,
        input_sum=x.sum(0),
        input_abs_sum=x.abs().sum(0),
        hidden_gram=h.T @ h,
        hidden_square_sum=h.square().sum(0),
        hidden_sum=h.sum(0),
        hidden_abs_sum=h.abs().sum(0),
        hidden_max=h.abs().max(0).values,
        hidden_active=(contribution > contribution.mean(1, keepdim=True)).sum(0).double(),
        sequence_mean_square=sum(wide.hidden(c.double()).abs().mean(0) ** 2 for c in inputs),  # type: ignore[arg-type]
    )
    assert_equal(found, expected)
    assert all(getattr(found, field.name).dtype == torch.float64 for field in fields(found))
    torch.testing.assert_close(found.hidden_variance, h.var(0, unbiased=False), rtol=1e-5, atol=1e-6)
    without = collect(wide, inputs, hidden_gram=False)
    assert without.hidden_gram.shape == (0, 0)
    without.hidden_gram = found.hidden_gram
    assert_equal(without, found)


def test_activity_counts_output_norms_above_the_mean_of_the_token() -> None:
    ffn = FFNWeights(up=torch.eye(3), down=torch.tensor([[1.0, 1.0, 10.0]]), act=nn.Identity())
    found = collect(ffn, [torch.tensor([[3.0, 0.0, 0.0], [3.0, 0.0, -0.2], [1.0, 1.0, 1.0]])])
    # Output norms of the three tokens: [3 0 0], [3 0 2], [1 1 10].
    assert found.hidden_active.tolist() == [2.0, 0.0, 2.0]
    assert found.hidden_max.tolist() == [3.0, 1.0, 1.0]


def test_sequences_weigh_the_same_whatever_their_length() -> None:
    ffn = FFNWeights(up=torch.eye(2), down=torch.eye(2), act=nn.Identity())
    found = collect(ffn, [torch.tensor([[2.0, -4.0]]), torch.tensor([[1.0, 0.0], [-3.0, 0.0], [2.0, 6.0]])])
    assert found.sequence_mean_square.tolist() == [4.0 + 4.0, 16.0 + 4.0]
    assert (float(found.sequences), float(found.tokens)) == (2.0, 4.0)


def test_padded_tokens_do_not_count() -> None:
    ffn, x = make_ffn(), torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]]).bool()
    clean = collect(ffn, [x[0, :4], x[1, 1:3]])
    x[~mask] = 1e6
    assert_equal(collect(ffn, rows_of(x, mask, 2)), clean)
    assert_equal(collect(ffn, rows_of(x.flatten(0, 1), mask, 2)), clean)


def test_rows_without_a_mask_are_told_apart_by_sequence() -> None:
    x = torch.arange(24.0).reshape(2, 4, 3)
    for form in (x, x.flatten(0, 1), x.reshape(2, 2, 2, 3)):
        assert [rows.tolist() for rows in rows_of(form, None, 2)] == x.tolist()
    # A model that took the padding out itself leaves rows that belong to no batch shape.
    (rows,) = rows_of(x.flatten(0, 1)[:7], torch.ones(2, 4).bool(), 2)
    assert rows.tolist() == x.flatten(0, 1)[:7].tolist()


@given(cuts=st.lists(st.integers(0, 30), max_size=6), gated=st.booleans(), seed=st.integers(0, 99))
def test_any_chunking_gives_the_same_sums(cuts: list[int], gated: bool, seed: int) -> None:
    ffn, x = make_ffn(gated=gated, seed=seed).map(lambda tensor: tensor.double()), make_inputs(30, seed=seed)[0]
    edges = [0, *sorted(cuts), 30]
    chunks = [x[start:stop] for start, stop in pairwise(edges)]
    found = collect(ffn, chunks)
    assert_equal(found, collect(ffn, [x]), without=PER_SEQUENCE)
    assert float(found.sequences) == sum(1 for chunk in chunks if len(chunk))


@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=6), split=st.integers(1, 5), seed=st.integers(0, 99))
def test_merged_halves_are_the_whole(lengths: list[int], split: int, seed: int) -> None:
    ffn, inputs = make_ffn(seed=seed), make_inputs(*lengths, seed=seed)
    first, second = collect(ffn, inputs[:split]), collect(ffn, inputs[split:])
    first.merge(second)
    assert_equal(first, collect(ffn, inputs))


def test_merging_leaves_the_other_half_alone() -> None:
    ffn, inputs = make_ffn(), make_inputs(4, 5)
    first, second = collect(ffn, inputs[:1]), collect(ffn, inputs[1:])
    kept = copy.deepcopy(second)
    first.merge(second)
    assert_equal(second, kept)


def test_save_and_load(tmp_path: Path) -> None:
    statistics = collect(make_ffn(), make_inputs(6, 2))
    statistics.save(tmp_path / "sums.safetensors")
    loaded = FFNStatistics.load(tmp_path / "sums.safetensors")
    for field in fields(FFNStatistics):
        assert torch.equal(getattr(loaded, field.name), getattr(statistics, field.name))
    loaded.merge(statistics)
    assert float(loaded.tokens) == 16.0


@pytest.mark.parametrize("field", [field.name for field in fields(FFNStatistics)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sum_that_is_not_finite_is_refused_by_name(field: str, value: float) -> None:
    statistics = collect(make_ffn(), make_inputs(6))
    statistics.check_finite("fine")
    getattr(statistics, field).view(-1)[-1] = value
    with pytest.raises(DataError, match=rf"model\.layers\.3: .* {field} holds NaN or Inf"):
        statistics.check_finite("model.layers.3")


def test_nan_inputs_are_refused_by_statistics_and_by_refits() -> None:
    inputs = make_inputs(6)
    inputs[0][2, 1] = torch.nan
    with pytest.raises(DataError, match=r"some\.layer: .* input_gram"):
        _ = layer(make_ffn(), inputs).statistics
    with pytest.raises(DataError, match=r"some\.layer: the sums of the refit"):
        layer(make_ffn(), inputs).refit_sums(lambda x: x)


def test_statistics_are_taken_once() -> None:
    data = layer(make_ffn(), make_inputs(6, 4))
    first = data.statistics
    data.inputs.drop()
    assert data.statistics is first


def test_refit_sums_are_those_of_the_targets() -> None:
    ffn, inputs = make_ffn(), make_inputs(6, 4)
    corrections = Activations(TensorCache(), "correction-")
    shift = make_inputs(6, 4, seed=9)
    for chunk in shift:
        corrections.append(chunk)
    data = layer(ffn, inputs, corrections=corrections)
    x = torch.cat(inputs)
    h = x[:, :3].double()
    y = (ffn.hidden(x) @ ffn.down.T + torch.cat(shift)).double()
    found = data.refit_sums(lambda x: x[:, :3])
    torch.testing.assert_close(found.gram, h.T @ h)
    torch.testing.assert_close(found.cross, h.T @ y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.energy, y.square().sum(), rtol=1e-4, atol=1e-4)
