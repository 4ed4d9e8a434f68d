"""Float8 weights and activations: bit patterns, how close they are, and that casts leave them alone."""

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
from ffsplit.ffn.projections import Float8, Float8Spec
from ffsplit.ffn.sum import Branch, SumFFN
from ffsplit.kernels import float8

properties = settings(deadline=None, derandomize=True, max_examples=40)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stored(rows: int, columns: int, *, activations: bool = True, seed: int = 0) -> Float8:
    spec = Float8Spec(shape=(rows, columns), activations=activations)
    return Float8.from_dense(random(rows, columns, seed=seed), spec, torch.float32)


def e4m3() -> Tensor:
    """All finite values from the format's definition: 4 bits of exponent (bias 7), 3 of mantissa, no infinity."""
    positive = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    positive += [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)][:-1]
    return torch.tensor(sorted({sign * value for sign in (-1, 1) for value in positive}), dtype=torch.float64)


def nearest(values: Tensor) -> Tensor:
    """Distance to the closest float8."""
    return (values.double()[..., None] - e4m3()).abs().amin(-1)


@properties
@given(rows=st.integers(0, 8), columns=st.integers(0, 40), seed=st.integers(0, 2**20))
def test_every_value_becomes_the_nearest_float8(rows: int, columns: int, seed: int) -> None:
    x = random(rows, columns, seed=seed) * torch.logspace(-6, 6, max(rows, 1))[:rows, None]
    codes, scale = float8.round_rows(x)
    found = float8.decode(codes, torch.ones_like(scale), torch.float64)
    assert bool(torch.isin(found, e4m3()).all())
    torch.testing.assert_close((found - (x / scale).double()).abs(), nearest(x / scale), rtol=1e-5, atol=1e-6)
    if columns:
        assert bool((found.abs().amax(1) == 448).all())


def test_weights_keep_their_relative_precision() -> None:
    weight, found = random(32, 200), stored(32, 200).dense(torch.float64)
    step = stored(32, 200).row_scale.double() * 2.0**-9  # of subnormal float8
    assert bool(((found - weight).abs() <= weight.abs().double() / 16 + step).all())


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_forward_is_its_definition(activations: bool, dtype: torch.dtype) -> None:
    projection, x = stored(24, 48, activations=activations), random(2, 5, 48, seed=1, dtype=dtype)
    expected = x.double()
    if activations:
        codes, scale = float8.round_rows(x.view(-1, 48))
        expected = float8.decode(codes, scale, torch.float64).view(2, 5, 48)
    expected = expected @ projection.dense(torch.float64).T
    found = projection(x)
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * 8)
    dense = x.double() @ random(24, 48).double().T
    assert float((found - dense).norm() / dense.norm()) < 0.06


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    projection, x = stored(8, 32), random(40, 32, seed=1) * torch.logspace(-3, 3, 40)[:, None]
    torch.testing.assert_close(projection(x), torch.cat([projection(row[None]) for row in x]), rtol=1e-5, atol=1e-7)
    assert projection(x[:0]).shape == (0, 8)


def test_zeros_and_values_that_are_not_finite() -> None:
    projection, x = stored(8, 16), random(4, 16, seed=1)
    x[0], x[1, 3], x[2, 5] = 0.0, float("inf"), float("nan")
    found = projection(x)
    assert torch.equal(found[0], torch.zeros(8))
    assert not bool(torch.isfinite(found[1:3]).any())
    assert bool(torch.isfinite(found[3]).all())
    dead = Float8.from_dense(torch.zeros(3, 16), Float8Spec(shape=(3, 16)), torch.float32)
    assert torch.equal(dead(random(2, 16)), torch.zeros(2, 3))


@pytest.mark.parametrize("size", [1e-36, 1e-38, 1e-44])
def test_a_row_next_to_nothing_has_a_scale(size: float) -> None:
    codes, scale = float8.round_rows(torch.tensor([[size, -size, 0.0]]))
    assert float(scale) >= torch.finfo(torch.float32).tiny
    found = float8.decode(codes, scale, torch.float32)
    torch.testing.assert_close(found, torch.tensor([[size, -size, 0.0]]), rtol=0.1, atol=1e-39)


@pytest.mark.parametrize("activations", [False, True])
def test_the_gradient_is_that_of_the_plain_product(activations: bool) -> None:
    projection, x = stored(8, 16, activations=activations), random(5, 16, seed=1).requires_grad_(True)
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
    fresh = Float8.empty(projection.spec, torch.bfloat16, torch.device("cpu"))
    fresh.load_state_dict(load(save(changed.state_dict())))
    assert torch.equal(fresh.dense(), weight)
    meta = Float8.empty(projection.spec, torch.float32, torch.device("meta"))
    assert meta(torch.empty(2, 21, device="meta")).shape == (2, 6)


@pytest.mark.parametrize("activations", [False, True])
def test_only_rounded_inputs_keep_it_from_being_dense(activations: bool) -> None:
    up, down = (stored(*shape, activations=activations) for shape in ((8, 16), (16, 8)))
    module = SumFFN(16, [Branch(nn.ReLU(), up, down)])
    if not activations:
        assert torch.equal(module.to_weights().up, up.dense())
        return
    with pytest.raises(ModelError, match="rounds its inputs"):
        module.to_weights()


def borderline_steps(x: Tensor) -> Tensor:
    """The step between the two float8 around every input that lies at the border of being rounded to either, else 0."""
    _, scale = float8.round_rows(x)
    table, exact = e4m3(), (x.float() / scale).double()
    above = torch.searchsorted(table, exact).clamp(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    border = (exact - (low + high) / 2).abs() <= 1e-6 * exact.abs()
    return torch.where(border, high - low, 0.0) * scale.double()


def assert_same_roundings(found: Tensor, x: Tensor, projection: Float8) -> None:
    """As the reference, but that an input at the border between two codes may have been rounded to either.

    The last bit of a scale, or of the division by it, may differ between devices.
    """
    expected = projection(x).double()
    either = borderline_steps(x) @ projection.dense(torch.float64).T.abs()
    beyond = (found.double() - expected).abs() - (2e-2 + 2e-2 * expected.abs() + either)
    assert bool((beyond <= 0).all()), f"off by up to {float(beyond.amax())} more than roundings explain"


def test_scales_of_another_device_are_told_from_an_error() -> None:
    projection, x = stored(16, 32), random(100, 32, seed=1, dtype=torch.bfloat16)
    _, scale = float8.round_rows(x)
    codes, _ = float8.round_rows(x, scale * (1 + 1e-7))
    found = (float8.decode(codes, scale, torch.float32) @ projection.dense().T).bfloat16()
    assert float((found - projection(x)).abs().amax()) > 0.2  # seen on an H100
    assert_same_roundings(found, x, projection)
    assert float((borderline_steps(x) > 0).any(1).double().mean()) < 0.2
    for wrong in (projection(x) * 1.05, projection(x.roll(1, 0)), (x.float() @ projection.dense().T)):
        with pytest.raises(AssertionError, match="than roundings explain"):
            assert_same_roundings(wrong, x, projection)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [0, 1, 17, 100])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (13, 21), (256, 576)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_accelerator_agrees_with_the_reference(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        pytest.skip("no accelerator")
    projection, x = stored(rows, columns), random(tokens, columns, seed=1, dtype=dtype)
    found = copy.deepcopy(projection).to(device)(x.to(device)).cpu()
    assert (found.shape, found.dtype) == ((tokens, rows), dtype)
    assert_same_roundings(found, x, projection)
