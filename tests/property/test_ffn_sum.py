"""An FFN is a sum over its neurons: every partition, in every order, computes the same function."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from ffsplit.errors import ModelError
from ffsplit.ffn.projections import (
    BlockDenseSpec,
    Dense,
    DenseSpec,
    LowRank,
    LowRankSpec,
    MaskedSpec,
    MonarchSpec,
    NMSpec,
    OutlierColumnsSpec,
    OutlierWeightsSpec,
    PackedSpec,
    StorageSpec,
)
from ffsplit.ffn.spec import BranchSpec, SumSpec
from ffsplit.ffn.sum import Branch, SumFFN, dense_branch
from ffsplit.ffn.weights import FFNWeights
from ffsplit.ops.block_factors import whole_blocks

FLAGS = st.booleans()
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@st.composite
def ffns(draw: st.DrawFn) -> FFNWeights:
    """A dense FFN in float64 of any kind: gated or plain, any of the biases."""
    d_model, d_ff = draw(st.integers(1, 9)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gated = draw(FLAGS)
    return FFNWeights(
        up=tensor(d_ff, d_model),
        down=tensor(d_model, d_ff),
        act=draw(st.sampled_from([nn.SiLU(), nn.GELU(), nn.ReLU()])),
        gate=tensor(d_ff, d_model) if gated else None,
        up_bias=tensor(d_ff) if draw(FLAGS) else None,
        gate_bias=tensor(d_ff) if gated and draw(FLAGS) else None,
        down_bias=tensor(d_model) if draw(FLAGS) else None,
    )


def inputs(ffn: FFNWeights) -> Tensor:
    return torch.randn(2, 3, ffn.d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def split(ffn: FFNWeights, owners: list[int]) -> SumFFN:
    """A sum with one dense branch per owner, of the neurons that it owns."""
    of = torch.tensor(owners)
    branches = [dense_branch(ffn.take(torch.nonzero(of == owner)[:, 0])) for owner in sorted(set(owners))]
    return SumFFN(ffn.d_model, branches, bias=ffn.down_bias)


@given(ffn=ffns(), data=st.data())
def test_every_partition_is_an_exact_sum(ffn: FFNWeights, data: st.DataObject) -> None:
    owners = data.draw(st.lists(st.integers(0, 3), min_size=ffn.d_ff, max_size=ffn.d_ff))
    parts = split(ffn, owners)
    assert len(parts.branches) == len(set(owners))
    torch.testing.assert_close(parts(inputs(ffn)), ffn(inputs(ffn)), **CLOSE)


@given(ffn=ffns(), seed=st.integers(0, 1000))
def test_the_order_of_neurons_is_free(ffn: FFNWeights, seed: int) -> None:
    order = torch.randperm(ffn.d_ff, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(ffn.take(order)(inputs(ffn)), ffn(inputs(ffn)), **CLOSE)


@given(ffn=ffns(), data=st.data())
def test_to_weights_is_the_same_function(ffn: FFNWeights, data: st.DataObject) -> None:
    owners = data.draw(st.lists(st.integers(0, 2), min_size=ffn.d_ff, max_size=ffn.d_ff))
    parts = split(ffn, owners)
    dense = parts.to_weights()
    assert (dense.d_ff, dense.gated, set(dense.tensors())) == (ffn.d_ff, ffn.gated, set(ffn.tensors()))
    torch.testing.assert_close(dense(inputs(ffn)), parts(inputs(ffn)), **CLOSE)
    assert {tensor.dtype for tensor in parts.to_weights(torch.float32).tensors().values()} == {torch.float32}


@given(ffn=ffns())
def test_a_bias_that_only_some_branches_have_stays(ffn: FFNWeights) -> None:
    """Branches without a bias count as having zeros; nothing is dropped from the others."""
    bias = torch.ones(ffn.d_ff, dtype=torch.float64)
    parts = SumFFN(
        ffn.d_model,
        [dense_branch(replace(ffn, up_bias=bias, gate_bias=bias if ffn.gated else None)),
         dense_branch(replace(ffn, up_bias=None, gate_bias=None))],
    )  # fmt: skip
    torch.testing.assert_close(parts.to_weights()(inputs(ffn)), parts(inputs(ffn)), **CLOSE)


def test_gated_and_plain_branches_are_no_dense_ffn() -> None:
    plain = FFNWeights(torch.ones(2, 3), torch.ones(3, 2), nn.ReLU())
    both = SumFFN(3, [dense_branch(plain), dense_branch(replace(plain, gate=torch.ones(2, 3)))])
    with pytest.raises(ModelError, match="gate"):
        both.to_weights()


@given(ffn=ffns(), data=st.data())
def test_parameters_and_bits_are_those_of_the_tensors(ffn: FFNWeights, data: st.DataObject) -> None:
    owners = data.draw(st.lists(st.integers(0, 2), min_size=ffn.d_ff, max_size=ffn.d_ff))
    parts = split(ffn, owners)
    numbers = sum(parameter.numel() for parameter in parts.parameters())
    assert parts.spec.parameters == numbers == ffn.n_parameters
    assert parts.spec.stored_bits(64) == 64 * numbers
    assert parts.spec.stored_bits() == 16 * numbers


@given(size=st.integers(1, 8), bias=FLAGS)
def test_the_empty_sum_returns_its_bias_or_nothing(size: int, bias: bool) -> None:
    constant = torch.arange(1.0, size + 1) if bias else None
    empty = SumFFN(size, bias=constant)
    out = empty(torch.full((2, 3, size), 7.0))
    assert torch.equal(out, torch.zeros(2, 3, size) if constant is None else constant.expand(2, 3, size))
    assert empty.spec.parameters == size * bias
    with pytest.raises(ModelError, match="dropped"):
        empty.to_weights()


@given(ffn=ffns(), rank=st.integers(0, 4))
def test_a_linear_map_is_added(ffn: FFNWeights, rank: int) -> None:
    a = torch.randn(ffn.d_model, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mapped = SumFFN(ffn.d_model, [dense_branch(ffn)], LowRank(a, a.T), ffn.down_bias)
    torch.testing.assert_close(mapped(inputs(ffn)), ffn(inputs(ffn)) + inputs(ffn) @ a @ a.T, **CLOSE)
    assert mapped.spec.parameters == ffn.n_parameters + 2 * rank * ffn.d_model
    with pytest.raises(ModelError, match="linear map"):
        mapped.to_weights()


@given(x=st.sampled_from([torch.float32, torch.bfloat16]))
def test_an_empty_sum_keeps_the_dtype(x: torch.dtype) -> None:
    assert SumFFN(4)(torch.ones(1, 4, dtype=x)).dtype == x


def projections(rows: int, columns: int) -> st.SearchStrategy[StorageSpec]:
    shape = (rows, columns)
    blocks, cells = whole_blocks(columns, 3), whole_blocks(columns, min(rows, 2))
    few = PackedSpec(shape=(rows, max(columns - 2, 1)), bits=3, group=4)
    single = OutlierWeightsSpec(shape=shape, packed=PackedSpec(shape=shape, bits=3, group=4), outliers=rows)
    return st.one_of(
        st.builds(BlockDenseSpec, shape=st.just(shape), blocks=st.just(blocks), rank=st.sampled_from([0, blocks])),
        st.builds(MonarchSpec, shape=st.just(shape), blocks=st.just(cells), rank=st.integers(0, 2)),
        st.just(OutlierColumnsSpec(shape=shape, packed=few) if columns > 2 else DenseSpec(shape=shape)),
        # One a row, as the counts of these tests have them.
        st.just(single if columns > 1 else DenseSpec(shape=shape)),
        st.just(DenseSpec(shape=shape)),
        st.builds(LowRankSpec, shape=st.just(shape), rank=st.integers(0, 5)),
        # As many values as a mask whose bytes are all 1 needs, as the states of these tests have them.
        st.just(MaskedSpec(shape=shape, kept=-(-rows * columns // 8))),
        st.sampled_from([NMSpec(shape=shape, n=2, m=4), NMSpec(shape=shape, n=3, m=8)]),
        st.builds(
            PackedSpec,
            shape=st.just(shape),
            bits=st.integers(2, 8),
            group=st.integers(1, columns),
            symmetric=FLAGS,
            scale_bits=st.sampled_from([8, 16]),
            input_scale=FLAGS,
        ),
    )


@st.composite
def specs(draw: st.DrawFn) -> SumSpec:
    d_model, gated, bias = draw(st.integers(1, 12)), draw(FLAGS), draw(FLAGS)

    def branch(neurons: int) -> BranchSpec:
        inner = projections(neurons, d_model)
        return BranchSpec(
            up=draw(inner),
            gate=draw(inner) if gated else None,
            down=draw(projections(d_model, neurons)),
            up_bias=bias,
            gate_bias=bias and gated,
        )

    return SumSpec(
        d_model=d_model,
        branches=tuple(branch(neurons) for neurons in draw(st.lists(st.integers(1, 9), max_size=3))),
        linear=draw(st.none() | projections(d_model, d_model)),
        bias=draw(FLAGS),
    )


@given(spec=specs())
def test_specs_survive_json(spec: SumSpec) -> None:
    assert SumSpec.model_validate(json.loads(spec.model_dump_json())) == spec
    assert SumSpec.model_validate_json(json.dumps(spec.model_dump(mode="json"))) == spec


@given(spec=specs())
def test_an_empty_sum_has_the_structure_and_loads_a_state(spec: SumSpec) -> None:
    full = SumFFN.empty(spec, nn.ReLU(), torch.float32, "cpu")
    assert full.spec == spec
    stored = full.state_dict()
    assert sum(8 * tensor.nbytes for tensor in stored.values()) == spec.stored_bits(32)
    with torch.no_grad():
        for tensor in stored.values():
            tensor.copy_(torch.ones_like(tensor))
    other = SumFFN.empty(spec, nn.ReLU(), torch.float32, "cpu")
    other.load_state_dict(stored)
    x = torch.ones(2, spec.d_model)
    assert torch.equal(other(x), full(x))
    assert SumFFN.empty(spec, nn.ReLU(), torch.float32, "meta").spec == spec


@given(spec=specs(), data=st.data())
def test_a_structure_that_does_not_fit_together_is_refused(spec: SumSpec, data: st.DataObject) -> None:
    """One changed dimension anywhere contradicts another."""
    values = spec.model_dump(mode="json")
    places = [part for branch in values["branches"] for part in (branch["up"], branch["gate"], branch["down"]) if part]
    places += [values["linear"]] if values["linear"] else []
    if not places:
        return
    place = data.draw(st.sampled_from(places))
    place["shape"][data.draw(st.integers(0, 1))] += 1
    with pytest.raises(ValidationError):
        SumSpec.model_validate(values)


@given(spec=specs(), key=st.sampled_from(["d_modle", "shape", "kind", ""]))
def test_an_unknown_key_is_refused(spec: SumSpec, key: str) -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        SumSpec.model_validate(spec.model_dump(mode="json") | {key: 1})


def test_a_branch_of_mixed_storages() -> None:
    torch.manual_seed(0)
    a, b, down = torch.randn(6, 2), torch.randn(2, 4), torch.randn(4, 6)
    branch = Branch(nn.SiLU(), LowRank(a, b), Dense(down))
    x = torch.randn(5, 4)
    torch.testing.assert_close(branch(x), nn.functional.silu(x @ (a @ b).T) @ down.T)
