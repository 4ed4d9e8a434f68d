"""Int8 weights and activations: exact integer sums on every path, and how close to the unrounded product."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from ffsplit.errors import ModelError
from ffsplit.ffn.projections import Int8Dynamic, Int8DynamicSpec
from ffsplit.ffn.sum import Branch, SumFFN
from ffsplit.kernels import int8

properties = settings(deadline=None, derandomize=True, max_examples=40)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stored(rows: int, columns: int, seed: int = 0) -> Int8Dynamic:
    return Int8Dynamic.from_dense(
        random(rows, columns, seed=seed), Int8DynamicSpec(shape=(rows, columns)), torch.float32
    )


def reference(projection: Int8Dynamic, x: Tensor) -> Tensor:
    """In float64 from the definition: codes of ``x`` per token, integer sums, scales."""
    largest = x.float().abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / 127)
    codes = torch.round(x.float() / scale).clamp(-127, 127).double()
    return codes @ projection.codes.double().T * scale.double() * projection.row_scale.double()


@properties
@given(rows=st.integers(0, 40), columns=st.integers(0, 70), outputs=st.integers(1, 20), seed=st.integers(0, 2**20))
def test_products_are_exact(rows: int, columns: int, outputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-127, 128, (n, columns), generator=generator).to(torch.int8) for n in (rows, outputs))
    expected = (a.long()[:, None] * b.long()[None]).sum(-1)
    for found in (int8.product(a, b), int8.exact_product(a, b)):
        assert found.dtype == torch.int32
        assert torch.equal(found.long(), expected)


@pytest.mark.parametrize("columns", [0, 1, 2, 7, 8, 9, 33])
def test_products_of_few_columns_are_exact(columns: int) -> None:
    """torch's kernel for CPUs is wrong for one column."""
    generator = torch.Generator().manual_seed(columns)
    for rows, outputs in [(1, 1), (1, 2), (2, 3), (5, 17), (40, 8)]:
        a, b = (torch.randint(-127, 128, (n, columns), generator=generator).to(torch.int8) for n in (rows, outputs))
        assert torch.equal(int8.product(a, b), int8.exact_product(a, b))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_saturate(sign: int) -> None:
    a = torch.full((33, 20_000), 127, dtype=torch.int8)
    assert bool((int8.product(a, sign * a[:8]) == sign * 20_000 * 127**2).all())


@properties
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    tokens=st.integers(0, 20),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
def test_the_forward_is_its_definition(rows: int, columns: int, tokens: int, dtype: torch.dtype, seed: int) -> None:
    projection, x = stored(rows, columns, seed), random(tokens, columns, seed=seed + 1, dtype=dtype)
    found = projection(x)
    assert found.dtype == dtype
    expected = reference(projection, x)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=1e-6)


@properties
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 2**20))
def test_weights_and_tokens_are_off_by_half_a_step(rows: int, columns: int, seed: int) -> None:
    weight, projection = random(rows, columns, seed=seed), stored(rows, columns, seed)
    step = projection.row_scale.double()[:, None]
    assert bool(((projection.dense(torch.float64) - weight.double()).abs() <= step * 0.5001).all())
    codes, scale = int8.round_rows(weight)
    assert bool(((codes * scale - weight).abs() <= scale * 0.5001).all())
    assert bool((codes.abs().amax(1) == 127).all())


def test_the_error_is_that_of_eight_bits() -> None:
    projection, x = stored(64, 256), random(100, 256, seed=1)
    expected = x.double() @ random(64, 256).double().T
    assert float((projection(x) - expected).norm() / expected.norm()) < 0.015


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    projection, x = stored(8, 32), random(40, 32, seed=1) * torch.logspace(-3, 3, 40)[:, None]
    assert torch.equal(projection(x), torch.cat([projection(row[None]) for row in x]))
    assert torch.equal(projection(x.view(2, 20, 32)).view(40, 8), projection(x))


def test_zeros_and_values_that_are_not_finite() -> None:
    projection, x = stored(8, 16), random(4, 16, seed=1)
    x[0], x[1, 3], x[2, 5] = 0.0, float("inf"), float("nan")
    found = projection(x)
    assert torch.equal(found[0], torch.zeros(8))
    assert not bool(torch.isfinite(found[1:3]).any())
    assert bool(torch.isfinite(found[3]).all())
    dead = Int8Dynamic.from_dense(torch.zeros(3, 16), Int8DynamicSpec(shape=(3, 16)), torch.float32)
    assert torch.equal(dead(random(2, 16)), torch.zeros(2, 3))


@pytest.mark.parametrize("size", [1e-36, 1e-38, 1e-44])
def test_a_row_next_to_nothing_has_a_scale(size: float) -> None:
    codes, scale = int8.round_rows(torch.tensor([[size, -size, 0.0]]))
    assert float(scale) >= torch.finfo(torch.float32).tiny
    torch.testing.assert_close(codes * scale, torch.tensor([[size, -size, 0.0]]), rtol=0.1, atol=1e-38)


def test_the_gradient_is_that_of_the_unrounded_product() -> None:
    projection, x = stored(8, 16), random(5, 16, seed=1).requires_grad_(True)
    with_gradient = projection(x)
    assert torch.equal(with_gradient, projection(x.detach()))
    (gradient,) = torch.autograd.grad(with_gradient.square().sum(), x)
    torch.testing.assert_close(gradient, 2 * with_gradient.detach() @ projection.dense())


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), copy.deepcopy])
def test_state_survives_casts_copies_and_files(cast: Any) -> None:
    projection = stored(6, 21)
    weight = projection.dense().clone()
    assert sum(8 * tensor.nbytes for tensor in projection.state_dict().values()) == projection.spec.stored_bits(16)
    changed = cast(nn.ModuleList([projection]))[0]
    assert torch.equal(changed.dense(), weight)
    fresh = Int8Dynamic.empty(projection.spec, torch.bfloat16, torch.device("cpu"))
    fresh.load_state_dict(load(save(changed.state_dict())))
    assert torch.equal(fresh.dense(), weight)
    meta = Int8Dynamic.empty(projection.spec, torch.float32, torch.device("meta"))
    assert meta(torch.empty(2, 21, device="meta")).shape == (2, 6)


def test_it_is_no_dense_ffn() -> None:
    module = SumFFN(16, [Branch(nn.ReLU(), stored(8, 16), stored(16, 8))])
    with pytest.raises(ModelError, match="rounds its inputs"):
        module.to_weights()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 100])
@pytest.mark.parametrize(("rows", "columns"), [(8, 16), (13, 21), (256, 576)])
def test_the_accelerator_gives_the_same_integers(tokens: int, rows: int, columns: int) -> None:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        pytest.skip("no accelerator")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (n, columns), generator=generator).to(torch.int8) for n in (tokens, rows))
    assert torch.equal(int8.product(a.to(device), b.to(device)).cpu(), int8.exact_product(a, b))
    # Inputs that are their own codes, so that no device's division can round one of them the other way.
    projection, x = stored(rows, columns), a.float()
    x[:, 0] = 127
    torch.testing.assert_close(copy.deepcopy(projection).to(device)(x.to(device)).cpu(), projection(x))
