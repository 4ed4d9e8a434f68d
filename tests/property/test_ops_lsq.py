"""Rounding with gradients, against the formulas of learned step size quantization as autograd has them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffsplit.ops.lsq import codes_of, rounded_weight
from ffsplit.ops.rounding import Grid, decode, encode

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 19), st.integers(1, 7), st.integers(1, 8), st.integers(0, 999))


def made(rows: int, columns: int, group: int, bits: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    scale = (0.05 + torch.rand(rows, groups, generator=generator)).half().float()
    zero = torch.randint(0, 2**bits, (rows, groups), generator=generator).float()
    return torch.randn(rows, columns, generator=generator) * 2**bits / 3, scale, zero


@given(SHAPES)
def test_values_are_those_of_the_reference(shape: tuple[int, int, int, int, int]) -> None:
    _, _, group, bits, _ = shape
    weight, scale, zero = made(*shape)
    grid = Grid(scale, zero.to(torch.uint8), group)
    codes = encode(weight, grid, bits)
    assert torch.equal(codes_of(weight, scale, zero, bits=bits, group=group), codes.float())
    assert torch.equal(rounded_weight(weight, scale, zero, bits=bits, group=group), decode(codes, grid, torch.float32))


@given(SHAPES)
def test_gradients_are_those_of_straight_through_rounding(shape: tuple[int, int, int, int, int]) -> None:
    _, columns, group, bits, seed = shape
    weight, scale, zero = (tensor.double() for tensor in made(*shape))
    towards = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    leaves = [weight.requires_grad_(), scale.requires_grad_()]
    each, offset = (values.repeat_interleave(group, dim=1)[:, :columns] for values in (scale, zero))
    ratio = weight / each
    code = (ratio + (ratio.round() - ratio).detach() + offset).clamp(0, 2**bits - 1)
    wanted = torch.autograd.grad(((code - offset) * each * towards).sum(), leaves)
    found = torch.autograd.grad((rounded_weight(weight, scale, zero, bits=bits, group=group) * towards).sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
