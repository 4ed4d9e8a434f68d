"""Packed matrices: every bit width, ragged columns and groups, casts and gradients."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffsplit.ffn.projections import Packed, PackedSpec
from ffsplit.kernels.packed import dequantize
from ffsplit.ops.packing import pack, unpack
from ffsplit.ops.rounding import Grid, decode, round_to_nearest

SHAPES = [(3, 1, 8), (5, 13, 4), (4, 16, 16), (7, 33, 8), (2, 40, 64), (6, 24, 7)]


def example(
    bits: int, rows: int, columns: int, group: int, symmetric: bool = False, scale_bits: int = 16
) -> tuple[Packed, Tensor, Grid]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits + columns))
    codes, grid = round_to_nearest(weight, bits, group, symmetric=symmetric, scale_bits=scale_bits)
    return Packed.from_codes(codes, grid, bits=bits, group=group, symmetric=symmetric), codes, grid


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_stored_matrix_is_the_decoded_one(
    bits: int, rows: int, columns: int, group: int, symmetric: bool, dtype: torch.dtype, scale_bits: int
) -> None:
    packed, codes, grid = example(bits, rows, columns, group, symmetric, scale_bits)
    assert torch.equal(packed.dense(dtype), decode(codes, grid, dtype))
    assert sum(8 * tensor.nbytes for tensor in packed.state_dict().values()) == packed.spec.stored_bits(16)


@pytest.mark.parametrize("bits", range(2, 9))
def test_forward_multiplies_by_the_decoded_matrix(bits: int) -> None:
    packed, codes, grid = example(bits, 5, 13, 4)
    x = torch.randn(2, 3, 13)
    torch.testing.assert_close(packed(x), x @ decode(codes, grid, torch.float32).T)


def test_one_bit() -> None:
    packed, codes, grid = example(1, 4, 9, 3)
    assert torch.equal(packed.dense(), decode(codes, grid, torch.float32))


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_casts_change_no_stored_bit(cast: Any, scale_bits: int) -> None:
    packed, _, _ = example(3, 6, 20, 8, scale_bits=scale_bits)
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    weight = packed.dense().clone()
    cast(nn.ModuleList([packed]))
    assert all(torch.equal(packed.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(packed.dense(), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    packed, _, _ = example(4, 6, 20, 8)
    assert packed(torch.ones(2, 20, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("scale_bits", [8, 16])
def test_gradients_reach_the_input(scale_bits: int) -> None:
    packed, _, _ = example(4, 5, 13, 4, scale_bits=scale_bits)
    x = torch.randn(3, 13, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packed, (x,))
    assert not list(packed.parameters())


@pytest.mark.parametrize("scale_bits", [8, 16])
def test_the_state_survives_safetensors_and_a_fresh_module(scale_bits: int) -> None:
    from safetensors.torch import load, save

    packed, _, _ = example(5, 6, 21, 8, scale_bits=scale_bits)
    stored = save(packed.state_dict())
    fresh = Packed.empty(packed.spec, torch.bfloat16, torch.device("cpu"))
    fresh.load_state_dict(load(io.BytesIO(stored).getvalue()))
    assert torch.equal(fresh.dense(), packed.dense())


def test_a_structure_stored_before_there_were_8_bit_scales() -> None:
    packed, _, _ = example(5, 6, 21, 8)
    old = packed.spec.model_dump()
    del old["scale_bits"]
    spec = PackedSpec.model_validate(old)
    assert spec == packed.spec
    fresh = Packed.empty(spec, torch.float32, torch.device("cpu"))
    assert set(fresh.state_dict()) == {"codes", "scale", "zero"}
    fresh.load_state_dict({name: packed.state_dict()[name] for name in ("codes", "scale", "zero")})
    assert torch.equal(fresh.dense(), packed.dense())


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_input_scales_multiply_the_columns(dtype: torch.dtype, scale_bits: int) -> None:
    plain, codes, grid = example(4, 6, 21, 8, scale_bits=scale_bits)
    factors = torch.linspace(0.01, 7, 21).half()
    packed = Packed.from_codes(codes, grid, bits=4, group=8, input_scale=factors)
    exact = plain.dense(torch.float64) * factors.double()
    torch.testing.assert_close(packed.dense(torch.float64), exact, rtol=1e-12, atol=0)
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(packed.dense(dtype), (plain.dense(wide) * factors.to(wide)).to(dtype))
    x = torch.randn(3, 21, dtype=torch.float64)
    torch.testing.assert_close(packed(x), (x * factors) @ plain.dense(torch.float64).T)
    packed.to(torch.bfloat16)
    torch.testing.assert_close(packed.dense(torch.float64), exact, rtol=1e-12, atol=0)
    assert packed.spec.stored_bits(16) == plain.spec.stored_bits(16) + 16 * 21
    assert sum(8 * t.nbytes for t in packed.state_dict().values()) == packed.spec.stored_bits(16)
    assert Packed.empty(packed.spec, dtype, torch.device("cpu")).state_dict().keys() == packed.state_dict().keys()


def test_8_bit_scales_halve_what_scales_cost() -> None:
    sixteen, eight = (PackedSpec(shape=(64, 512), bits=3, group=64, scale_bits=bits) for bits in (16, 8))
    assert sixteen.stored_bits(16) - eight.stored_bits(16) == 64 * (8 * 8 - 16)


def test_meta_tensors_pass() -> None:
    packed = Packed.empty(example(3, 6, 21, 8)[0].spec, torch.float32, torch.device("meta"))
    assert packed(torch.empty(2, 21, device="meta")).shape == (2, 6)


def test_a_symmetric_grid_has_no_zeros() -> None:
    packed, _, grid = example(4, 5, 13, 4, symmetric=True)
    assert packed.zero is None
    assert "zero" not in packed.state_dict()
    assert bool((grid.zero == 8).all())


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpacking_compiles_to_one_graph(bits: int) -> None:
    codes = torch.arange(2 * 3 * 11).reshape(2, 3, 11).remainder(2**bits).to(torch.uint8)
    compiled = torch.compile(unpack, backend="eager", fullgraph=True)
    assert torch.equal(compiled(pack(codes, bits), bits, 11), codes)


def test_functions_and_modules_agree() -> None:
    packed, _, _ = example(6, 5, 13, 4)
    x = torch.randn(3, 13)
    options: dict[str, Any] = {"bits": 6, "group": 4}
    weight = dequantize(packed.codes, packed.scale, packed.zero, columns=13, dtype=torch.float32, **options)
    assert torch.equal(weight, packed.dense())
    assert torch.equal(x @ weight.T, packed(x))
