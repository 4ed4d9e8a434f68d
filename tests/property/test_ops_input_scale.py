from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffsplit.ops.input_scale import scale_inputs, search_input_scale
from ffsplit.ops.refine import output_error
from ffsplit.ops.rounding import decode, round_to_nearest
from tests.property.amount import examples

properties = examples(25)


def layer(rows: int, columns: int, seed: int, tokens: int = 60, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """A weight and the Gram of inputs whose columns differ by ``10 ** spread`` in size, in random order."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, -spread, columns, dtype=torch.float64)[torch.randperm(columns, generator=generator)]
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) * sizes
    return torch.randn(rows, columns, generator=generator), x.T @ x


def rounded_error(
    weight: Tensor, gram: Tensor, factors: Tensor, bits: int, group: int | None, scale_bits: int
) -> float:
    """The outputs' error computed from its definition, ``x W^T - (x m) Q(W / m)^T``."""
    scaled, scaled_gram = scale_inputs(weight, gram, factors)
    importance = scaled_gram.diagonal() + 1e-12
    codes, grid = round_to_nearest(scaled, bits, group, search=True, importance=importance, scale_bits=scale_bits)
    return float(output_error(weight, decode(codes, grid, torch.float64) * factors.double(), gram))


@properties
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 30),
    bits=st.integers(2, 4),
    group=st.sampled_from([None, 4, 16]),
    scale_bits=st.sampled_from([8, 16]),
    powers=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_searched_scales_never_lose_to_none(
    rows: int, columns: int, bits: int, group: int | None, scale_bits: int, powers: bool, seed: int
) -> None:
    weight, gram = layer(rows, columns, seed)
    found = search_input_scale(weight, gram, bits, group, scale_bits=scale_bits, powers_of_two=powers, steps=6)
    plain = rounded_error(weight, gram, torch.ones(columns).half(), bits, group, scale_bits)
    assert rounded_error(weight, gram, found, bits, group, scale_bits) <= plain * (1 + 1e-4) + 1e-9
    assert float(found.min()) >= 2**-8
    assert float(found.max()) <= 2**8
    if powers:
        assert torch.equal(found.double().log2(), found.double().log2().round())


def test_the_best_of_all_candidates_is_taken() -> None:
    weight, gram = layer(12, 32, 3)
    found = search_input_scale(weight, gram, 3, 16, steps=10)
    logs = gram.diagonal().log2() / 2
    candidates = [torch.exp2(-step / 10 * (logs - logs.mean())).half() for step in range(11)]
    errors = [rounded_error(weight, gram, factors, 3, 16, 16) for factors in candidates]
    assert rounded_error(weight, gram, found, 3, 16, 16) <= min(errors) * (1 + 1e-4)
    assert errors.index(min(errors)) > 0, "an example in which scaling pays"


def test_a_few_large_inputs_are_what_scaling_is_for() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    x = torch.randn(500, 64, generator=generator, dtype=torch.float64)
    x[:, [3, 40]] *= 30
    gram = x.T @ x
    found = search_input_scale(weight, gram, 3, 32)
    plain = rounded_error(weight, gram, torch.ones(64).half(), 3, 32, 16)
    assert rounded_error(weight, gram, found, 3, 32, 16) < 0.9 * plain
    assert float(found[3]) < float(found[4])


@pytest.mark.parametrize("powers", [False, True])
def test_inputs_of_all_sizes_gain_from_scaling(powers: bool) -> None:
    for seed in range(3):
        weight, gram = layer(48, 96, seed, tokens=400)
        found = search_input_scale(weight, gram, 3, 32, powers_of_two=powers)
        plain = rounded_error(weight, gram, torch.ones(96).half(), 3, 32, 16)
        assert rounded_error(weight, gram, found, 3, 32, 16) < 0.95 * plain


def test_scaling_changes_no_output() -> None:
    weight, gram = layer(4, 10, 1)
    factors = torch.linspace(0.01, 5, 10).half()
    scaled, scaled_gram = scale_inputs(weight.double(), gram, factors)
    x = torch.randn(7, 10, dtype=torch.float64)
    torch.testing.assert_close((x * factors) @ scaled.T, x @ weight.double().T)
    torch.testing.assert_close(scaled @ scaled_gram @ scaled.T, weight.double() @ gram @ weight.double().T)


def test_dead_inputs_and_dead_grams() -> None:
    weight, gram = layer(4, 10, 1)
    gram[2], gram[:, 2] = 0.0, 0.0
    assert float(search_input_scale(weight, gram, 3, 5)[2]) == 1.0
    assert torch.equal(search_input_scale(weight, torch.zeros(10, 10), 3, 5), torch.ones(10).half())
    huge = torch.diag(torch.logspace(-30, 30, 10, dtype=torch.float64))
    assert bool(torch.isfinite(search_input_scale(weight, huge, 3, 5)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_powers_of_two_change_no_bit_of_a_weight(dtype: torch.dtype) -> None:
    weight, gram = layer(4, 32, 1)
    factors = search_input_scale(weight, gram, 2, 8, powers_of_two=True).to(dtype)
    assert len(factors.unique()) > 1
    weight = weight.to(dtype)
    assert torch.equal(weight / factors * factors, weight)
