"""Masked and N:M matrices: what is stored, ragged sizes, casts, gradients, and the choice of the 2:4 kernel."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ffsplit.ffn.projections import NM, Masked, MaskedSpec, NMSpec, Projection
from ffsplit.kernels import n_m
from ffsplit.ops.sparsity import n_m_mask, rows_mask

SHAPES = [(3, 1), (5, 13), (4, 16), (7, 33), (2, 40), (1, 4)]
PATTERNS = [(1, 2), (2, 4), (4, 8), (3, 5), (1, 3), (1, 16)]


def weight_of(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))


def masked(rows: int, columns: int, kept: int | None = None) -> tuple[Masked, Tensor]:
    weight = weight_of(rows, columns)
    mask = rows_mask(weight.abs(), rows * columns // 2 if kept is None else kept)
    return Masked.from_dense(weight, mask), weight * mask


def sparse(rows: int, columns: int, n: int = 2, m: int = 4) -> tuple[NM, Tensor]:
    weight = weight_of(rows, columns)
    mask = n_m_mask(weight.abs(), n, m)
    return NM.from_dense(weight, mask, n, m), weight * mask


EXAMPLES = [masked(5, 13), sparse(5, 13), sparse(4, 16, 4, 8)]


def bits(projection: Projection) -> int:
    return sum(8 * tensor.nbytes for tensor in projection.state_dict().values())


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_masked_matrix_is_the_masked_one(rows: int, columns: int) -> None:
    for kept in {0, rows * columns // 2, rows * columns}:
        stored, expected = masked(rows, columns, kept)
        assert torch.equal(stored.dense(), expected)
        assert stored.spec.parameters == stored.values.numel() == kept
        assert stored.spec.stored_bits(32) == bits(stored)
        assert stored.spec.macs == rows * columns


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_an_n_m_matrix_is_the_masked_one(rows: int, columns: int, n: int, m: int) -> None:
    stored, expected = sparse(rows, columns, n, m)
    assert torch.equal(stored.dense(), expected)
    assert stored.spec.parameters == stored.values.numel() == rows * -(-columns // m) * n
    assert stored.spec.stored_bits(32) == bits(stored)


def test_what_is_counted() -> None:
    """By hand: a bit a weight for masks, two a value for 2:4, three for 4:8."""
    shape = (64, 96)
    assert MaskedSpec(shape=shape, kept=1000).stored_bits(16) == 1000 * 16 + 64 * 96
    assert NMSpec(shape=shape, n=2, m=4).stored_bits(16) == 64 * 48 * (16 + 2)
    assert NMSpec(shape=shape, n=4, m=8).stored_bits(16) == 64 * 48 * (16 + 3)
    assert NMSpec(shape=shape, n=2, m=4).macs == 64 * 48
    assert NMSpec(shape=shape, n=4, m=8).macs == 64 * 96, "no hardware leaves work out of it"


def test_a_group_with_fewer_survivors_is_filled_with_zeros() -> None:
    weight = torch.tensor([[0.0, 5.0, 0.0, 0.0, 0.0, 0.0]])
    stored = NM.from_dense(weight, weight != 0, 2, 4)
    assert torch.equal(stored.dense(), weight)
    assert stored.values.tolist() == [[0.0, 5.0, 0.0, 0.0]]


def test_what_is_not_marked_is_not_stored() -> None:
    weight, mask = torch.ones(2, 4), torch.tensor([[True, False, False, False]] * 2)
    assert torch.equal(NM.from_dense(weight, mask, 2, 4).dense(), mask.float())
    assert torch.equal(Masked.from_dense(weight, mask).dense(), mask.float())


def test_too_many_survivors_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 2 of 4"):
        NM.from_dense(torch.ones(1, 8), torch.ones(1, 8, dtype=torch.bool), 2, 4)


@pytest.mark.parametrize("fields", [{"n": 4, "m": 4}, {"n": 0, "m": 4}, {"n": 2, "m": 257}, {"n": 5, "m": 4}])
def test_no_pattern(fields: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        NMSpec(shape=(4, 4), **fields)


def test_more_than_the_matrix_has() -> None:
    with pytest.raises(ValidationError, match="kept=17"):
        MaskedSpec(shape=(4, 4), kept=17)


@pytest.mark.parametrize(("stored", "expected"), EXAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_forward_multiplies_by_it(stored: Projection, expected: Tensor, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, expected.shape[1], dtype=dtype)
    torch.testing.assert_close(stored(x), x @ expected.to(dtype).T)
    assert stored(x[:0]).shape == (0, 3, expected.shape[0])


@pytest.mark.parametrize(("stored", "expected"), EXAMPLES)
def test_casts_round_values_and_move_nothing(stored: Projection, expected: Tensor) -> None:
    cast = copy.deepcopy(nn.ModuleList([stored])).to(torch.bfloat16)[0]
    assert torch.equal(cast.dense(), expected.to(torch.bfloat16))
    assert torch.equal(stored.dense(), expected)


@pytest.mark.parametrize(("stored", "expected"), EXAMPLES)
def test_gradients_reach_inputs_and_values(stored: Projection, expected: Tensor) -> None:
    wide = copy.deepcopy(stored).double()
    x = torch.randn(3, expected.shape[1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, values: torch.func.functional_call(wide, {"values": values}, x),
                                    (x, wide.values.detach().requires_grad_(True)))  # fmt: skip


@pytest.mark.parametrize(("stored", "expected"), EXAMPLES)
def test_the_state_survives_safetensors_and_a_fresh_module(stored: Projection, expected: Tensor) -> None:
    from safetensors.torch import load, save

    fresh = type(stored).empty(stored.spec, torch.float32, torch.device("cpu"))
    fresh.load_state_dict(load(io.BytesIO(save(stored.state_dict())).getvalue()))
    assert torch.equal(fresh.dense(), expected)


@pytest.mark.parametrize(("stored", "expected"), EXAMPLES)
def test_meta_tensors_and_full_graph_compile(stored: Projection, expected: Tensor) -> None:
    empty = type(stored).empty(stored.spec, torch.float32, torch.device("meta"))
    assert empty(torch.empty(2, expected.shape[1], device="meta")).shape == (2, expected.shape[0])
    x = torch.randn(2, expected.shape[1])
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(stored, backend="eager", fullgraph=True)(x), stored(x))


class Cores:
    """Stands in for torch's conversion: counts the calls, keeps the matrix dense."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []

    def __call__(self, dense: Tensor) -> Tensor:
        self.made.append(dense)
        return dense


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Cores:
    """A machine that seems to have sparse tensor cores."""
    counter = Cores()
    monkeypatch.setattr(n_m, "to_sparse_semi_structured", counter)
    monkeypatch.setattr(n_m, "_has_sparse_cores", lambda x, values: True)
    return counter


def test_the_fast_matrix_is_made_once_and_is_no_state(cores: Cores) -> None:
    stored, expected = sparse(32, 64)
    x = torch.randn(2, 3, 64)
    for _ in range(2):
        torch.testing.assert_close(stored(x), x @ expected.T)
    assert len(cores.made) == 1
    assert set(stored.state_dict()) == {"values", "positions"}
    for other in (copy.deepcopy(stored), pickle.loads(pickle.dumps(stored))):
        assert other.derived.is_empty
        torch.testing.assert_close(other(x), stored(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: stored.values.mul_(2),
        lambda stored: stored.load_state_dict({n: 3 * t for n, t in stored.state_dict().items() if n == "values"}
                                              | {"positions": stored.positions}),
        lambda stored: setattr(stored, "values", nn.Parameter(stored.values * 4)),
        lambda stored: stored.double().float(),
        lambda stored: stored._apply(lambda t: t * 5 if t.is_floating_point() else t),
    ],
)  # fmt: skip
@torch.no_grad()
def test_the_fast_matrix_follows_the_stored_one(cores: Cores, change: Any) -> None:
    stored, _ = sparse(32, 64)
    x = torch.randn(2, 64)
    stored(x)
    change(stored)
    torch.testing.assert_close(stored(x), x @ stored.dense().T)
    assert len(cores.made) == 2


def test_another_dtype_of_the_input_is_another_matrix(cores: Cores) -> None:
    stored, _ = sparse(32, 64)
    assert stored(torch.randn(2, 64)).dtype == torch.float32
    assert stored(torch.randn(2, 64).to(torch.bfloat16)).dtype == torch.bfloat16
    assert [dense.dtype for dense in cores.made] == [torch.float32, torch.bfloat16]


def test_other_patterns_have_no_kernel(cores: Cores) -> None:
    stored, expected = sparse(32, 64, 4, 8)
    x = torch.randn(2, 64)
    torch.testing.assert_close(stored(x), x @ expected.T)
    assert not cores.made


def test_a_cpu_has_no_sparse_cores() -> None:
    assert not n_m._has_sparse_cores(torch.ones(1, 64, dtype=torch.float16), torch.ones(32, 32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [(1,), (7,), (2, 33), (128,), (0,)], ids=str)
def test_sparse_cores_agree_with_the_reference(dtype: torch.dtype, tokens: tuple[int, ...]) -> None:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or device.type != "cuda":
        pytest.skip("2:4 kernels are NVIDIA's")
    stored = sparse(96, 192)[0].to(device, dtype)
    x = torch.randn(*tokens, 192, device=device, dtype=dtype)
    with torch.inference_mode():
        found = stored(x)
        assert (not stored.derived.is_empty) == bool(x.numel()), "the kernel was not used"
    torch.testing.assert_close(found, x @ stored.dense().T, rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        stored.values.mul_(2)
        torch.testing.assert_close(stored(x), 2 * found, rtol=2e-2, atol=4e-2)
    x.requires_grad_(True)
    stored(x).sum().backward()
    assert x.grad is not None
    assert stored.values.grad is not None
