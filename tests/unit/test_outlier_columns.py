"""Matrices with some columns in full: what is stored, and that the columns in full are worth it."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load, save
from torch import Tensor

from ffsplit.ffn.projections import OutlierColumns, OutlierColumnsSpec, Packed, PackedSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.budgets import packed_branch_spec
from ffsplit.methods.compressors import Rounding
from ffsplit.ops.refine import output_error
from ffsplit.ops.rounding import round_to_nearest

FLOAT32 = torch.float32


def example(columns: int = 21, index: tuple[int, ...] = (0, 7, 20), dtype: torch.dtype = FLOAT32) -> OutlierColumns:
    generator = torch.Generator().manual_seed(0)
    codes, grid = round_to_nearest(torch.randn(6, columns - len(index), generator=generator), 3, 8)
    packed = Packed.from_codes(codes, grid, bits=3, group=8)
    return OutlierColumns(packed, torch.tensor(index), torch.randn(6, len(index), generator=generator).to(dtype))


def layer(rows: int = 32, columns: int = 64) -> tuple[Tensor, Tensor]:
    """Inputs three of which are large."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, columns, generator=generator, dtype=torch.float64)
    x = x + x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64) / 8
    x[:, [5, 17, 40]] *= 20
    return torch.randn(rows, columns, generator=generator), x.T @ x


def spec(outliers: int, rows: int = 32, columns: int = 64) -> OutlierColumnsSpec:
    return OutlierColumnsSpec(
        shape=(rows, columns), packed=PackedSpec(shape=(rows, columns - outliers), bits=3, group=16)
    )


@pytest.mark.parametrize("index", [(0,), (20,), (0, 7, 20), tuple(range(20))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_matrix_is_put_together_in_the_order_of_its_columns(index: tuple[int, ...], dtype: torch.dtype) -> None:
    stored = example(index=index)
    others = [column for column in range(21) if column not in index]
    expected = torch.empty(6, 21, dtype=dtype)
    expected[:, others], expected[:, list(index)] = stored.packed.dense(dtype), stored.values.detach().to(dtype)
    assert torch.equal(stored.dense(dtype), expected)
    x = torch.randn(2, 3, 21, dtype=dtype)
    torch.testing.assert_close(stored(x), x @ expected.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_stored_is_what_is_counted(dtype: torch.dtype) -> None:
    stored = example(dtype=dtype)
    state = stored.state_dict()
    assert sum(8 * tensor.nbytes for tensor in state.values()) == stored.spec.stored_bits(8 * dtype.itemsize)
    fresh = OutlierColumns.empty(stored.spec, dtype, torch.device("cpu"))
    assert fresh.spec == stored.spec
    fresh.load_state_dict(load(save(state)))
    assert torch.equal(fresh.dense(), stored.dense())
    integers = {name: tensor for name, tensor in state.items() if not tensor.is_floating_point()}
    cast = copy.deepcopy(stored).to(torch.bfloat16).state_dict()
    assert all(torch.equal(cast[name], tensor) for name, tensor in integers.items())
    assert cast["values"].dtype == torch.bfloat16


def test_gradients_reach_inputs_and_columns_in_full() -> None:
    stored, x = example(), torch.randn(4, 21, requires_grad=True)
    weight = stored.dense().detach()
    on_x, on_values = torch.autograd.grad(stored(x).sum(), [x, stored.values])
    torch.testing.assert_close(on_x, weight.sum(0).expand(4, 21))
    torch.testing.assert_close(on_values, x.detach().sum(0)[[0, 7, 20]].expand(6, 3))
    meta = OutlierColumns.empty(stored.spec, FLOAT32, torch.device("meta"))
    assert meta(torch.empty(2, 21, device="meta")).shape == (2, 6)


def test_structures_without_outliers_or_without_codes_are_refused() -> None:
    for columns in (21, 0):
        with pytest.raises(ValidationError, match="leave no outliers"):
            OutlierColumnsSpec(shape=(6, 21), packed=PackedSpec(shape=(6, columns), bits=3, group=8))


@torch.no_grad()
def test_the_large_inputs_are_kept_and_help() -> None:
    weight, gram = layer()
    for how in ("gptq", "awq"):
        rounding = Rounding(how, polish=1)  # type: ignore[arg-type]
        kept = rounding(weight, spec(3), gram, FLOAT32)
        assert isinstance(kept, OutlierColumns)
        assert kept.spec == spec(3)
        assert kept.index.tolist() == [5, 17, 40]
        plain = rounding(weight, PackedSpec(shape=(32, 64), bits=3, group=16), gram, FLOAT32)
        assert float(output_error(weight, kept.dense(), gram)) < 0.5 * float(output_error(weight, plain.dense(), gram))


@torch.no_grad()
def test_columns_in_full_absorb_the_error_of_the_others() -> None:
    weight, gram = layer()
    kept = Rounding("gptq")(weight, spec(8), gram, FLOAT32)
    assert isinstance(kept, OutlierColumns)
    absorbed = float(output_error(weight, kept.dense(), gram))
    kept.values.copy_(weight[:, kept.index.long()])
    assert absorbed < 0.9 * float(output_error(weight, kept.dense(), gram))


def test_without_data_the_columns_in_full_stay_as_they_are() -> None:
    weight = torch.randn(8, 16)
    weight[:, 3] *= 100
    kept = Rounding("rtn")(weight, spec(2, 8, 16), None, FLOAT32)
    assert isinstance(kept, OutlierColumns)
    assert torch.equal(kept.values, weight[:, kept.index.long()])


def test_matrices_rounded_together_share_their_columns() -> None:
    weight, gram = layer()
    up, gate = Rounding("gptq").together([weight[:16], weight[16:]], spec(3, 16), gram, FLOAT32)
    assert isinstance(up, OutlierColumns)
    assert isinstance(gate, OutlierColumns)
    assert torch.equal(up.index, gate.index)


@pytest.mark.parametrize(("share", "counts"), [(0.0, (0, 0)), (0.001, (1, 1)), (0.1, (3, 8)), (0.999, (31, 79))])
def test_a_share_of_the_columns_of_each_matrix(share: float, counts: tuple[int, int]) -> None:
    branch = packed_branch_spec(FFNShape(32, 80, gated=True), 80, 3, 16, outliers=share)
    found = [getattr(projection, "outliers", 0) for projection in (branch.up, branch.down)]
    assert tuple(found) == counts
