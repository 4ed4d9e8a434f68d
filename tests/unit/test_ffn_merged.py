"""Sums in merged products: the same numbers as branch by branch, and only where they may be."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from ffsplit.bench.memory import resident_bytes
from ffsplit.ffn import merged, merging
from ffsplit.ffn.projections import Dense, Int8Dynamic, Int8DynamicSpec, LowRank, Packed, Projection
from ffsplit.ffn.sum import Branch, SumFFN
from ffsplit.kernels import cache, cpu, cpu_int4, cpu_int8
from ffsplit.kernels.dispatch import exact_products, reference_only
from ffsplit.ops.rounding import round_to_nearest

D_MODEL, NEURONS = 256, 128
ROUNDED = 2e-2
"""Of the output's norm: an FFN of bfloat16 products."""


needs_few_int8 = pytest.mark.skipif(not cpu_int8.takes_few(1), reason="torch has no fbgemm kernel on this CPU")


def matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) / columns**0.5


def stored(kind: str, rows: int, columns: int) -> Projection:
    if kind == "dense":
        return Dense(matrix(rows, columns))
    if kind == "low_rank":
        return LowRank(matrix(rows, 24), matrix(24, columns))
    if kind == "w8a8":
        return Int8Dynamic.from_dense(matrix(rows, columns), Int8DynamicSpec(shape=(rows, columns)), torch.float32)
    bits = int(kind)
    codes, grid = round_to_nearest(matrix(rows, columns), bits, 64)
    return Packed.from_codes(codes, grid, bits=bits, group=64)


def ffn(*kinds: str, gated: bool = True, bias: bool = True, wide: int = 1) -> SumFFN:
    torch.manual_seed(len(kinds))

    def branch(kind: str, neurons: int) -> Branch:
        up, down = stored(kind, neurons, D_MODEL), stored(kind, D_MODEL, neurons)
        biases = (torch.randn(neurons), torch.randn(neurons) if gated else None) if bias else (None, None)
        return Branch(nn.SiLU(), up, down, stored(kind, neurons, D_MODEL) if gated else None, *biases)

    return SumFFN(
        D_MODEL, [branch(kind, wide * NEURONS * (1 + 2 * i)) for i, kind in enumerate(kinds)], bias=torch.randn(D_MODEL)
    )


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def exact(module: SumFFN, x: Tensor) -> Tensor:
    with reference_only():
        return copy.deepcopy(module).double()(x.double())


def mirrored(branch: Branch) -> Branch:
    """Another branch of the same structure."""
    other = copy.deepcopy(branch)
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.copy_(tensor.flip(0))
    return other


MERGED = [
    ("4",),
    ("4", "4"),
    ("8", "4"),
    ("8", "3", "2"),
    ("dense", "low_rank"),
    ("dense", "4"),
    ("low_rank", "8", "3"),
]
needs_int4 = pytest.mark.skipif(not cpu_int4.AVAILABLE, reason="torch has no vectorised int4 kernel on this CPU")


@needs_int4
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kinds", MERGED, ids="+".join)
@torch.no_grad()
def test_few_tokens_in_bfloat16_are_merged(kinds: tuple[str, ...], gated: bool) -> None:
    module = ffn(*kinds, gated=gated).bfloat16()
    for shape in ((1, D_MODEL), (2, 1, D_MODEL), (D_MODEL,)):
        x = torch.randn(shape).bfloat16()
        found = module(x)
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
        assert error(found, exact(module, x)) < ROUNDED
    assert not module.merged.is_empty
    assert all(branch.down.derived.is_empty for branch in module._branches()), "packed matrices are kept twice"


@needs_few_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kinds", [("w8a8",), ("w8a8", "w8a8")], ids="+".join)
@torch.no_grad()
def test_a_token_is_rounded_once_for_all_int8_matrices(kinds: tuple[str, ...], gated: bool, dtype: torch.dtype) -> None:
    module = ffn(*kinds, gated=gated, wide=8).to(dtype)
    x = torch.randn(cpu_int8.FEW_OF_SMALL + 1, D_MODEL).to(dtype)
    separate = module(x)
    for tokens in (1, 4):
        found = module(x[:tokens])
        assert found.dtype == dtype
        assert error(found, separate[:tokens].double()) < ROUNDED
    assert not module.merged.is_empty
    module._branches()[-1].up.codes.neg_()
    changed = module(x[:4])
    assert error(changed, separate[:4].double()) > 0.1
    assert error(changed, module(x)[:4].double()) < ROUNDED


@needs_few_int8
@torch.no_grad()
def test_int8_matrices_that_are_not_merged_and_what_is_kept_of_those_that_are() -> None:
    x = torch.randn(2, D_MODEL)
    module = ffn("dense", "w8a8", wide=4).bfloat16()
    module(x.bfloat16())
    assert module.merged.is_empty, "a dense branch would be copied"
    module = ffn("w8a8", wide=4, bias=False)  # a bias would record gradients
    stored = resident_bytes(module)
    weights = sum(p.codes.nbytes for b in module._branches() for p in (b.up, b.gate, b.down))
    with torch.enable_grad():  # branch by branch
        module(x)
    assert resident_bytes(module) == stored + weights
    module(x)
    assert resident_bytes(module) == stored + weights, "kept twice"
    module(torch.randn(cpu_int8.FEW_OF_SMALL + 1, D_MODEL))
    assert resident_bytes(module) > stored + 2 * weights


@needs_int4
@torch.no_grad()
def test_what_cannot_or_need_not_be_merged_is_not() -> None:
    few, many = torch.randn(2, D_MODEL), torch.randn(60, D_MODEL)
    for module, x in (
        (ffn("dense", "low_rank"), few),
        (ffn("8", "4"), few),  # 8 bits in float32
        (ffn("dense").bfloat16(), few.bfloat16()),
        (ffn("low_rank", "4"), many),
        (ffn("4", "4"), few[:0]),
    ):
        wanted = exact(module, x)
        torch.testing.assert_close(module(x).double(), wanted, rtol=5e-2, atol=5e-2)
        assert module.merged.is_empty
    module = ffn("4", "4")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(module(few), exact(module, few)) < ROUNDED
    assert module.merged.is_empty


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kinds", [("4",), ("8", "4"), ("8", "3", "2"), ("dense", "4")], ids="+".join)
@torch.no_grad()
def test_many_tokens_are_multiplied_by_merged_decoded_matrices(
    kinds: tuple[str, ...], fast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "FAST_BFLOAT16", fast)
    monkeypatch.setattr(cpu, "SLOW_BFLOAT16", not fast)
    module, x = ffn(*kinds, wide=5).to(dtype), torch.randn(60, D_MODEL).to(dtype)
    room = cache.decoded_room(x.device)
    found = module(x)
    assert found.dtype == dtype
    exactly = dtype == torch.float32 and (not fast or kinds == ("8",))
    assert error(found, exact(module, x)) < (1e-5 if exactly else ROUNDED)
    assert not module.merged.is_empty
    assert cache.decoded_room(x.device) < room
    assert all(branch.up.derived.is_empty for branch in module._branches() if isinstance(branch.up, Packed))
    handle = module._branches()[0].register_forward_hook(lambda _branch, _inputs, out: out * 2)
    assert error(module(x), exact(module, x)) < ROUNDED
    assert not torch.equal(module(x), found)
    handle.remove()
    for branch in module._branches():
        if isinstance(branch.up, Packed):
            branch.up.codes.bitwise_not_()
    assert error(module(x), exact(module, x)) < ROUNDED
    module.merged.drop()
    cache.set_decoded_limit(0)
    try:
        assert error(module(x), exact(module, x)) < ROUNDED
        assert module.merged.is_empty
    finally:
        cache.set_decoded_limit(None)
    module(x)
    assert not module.merged.is_empty, "there is room again"


@torch.no_grad()
def test_nothing_is_kept_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FAST_BFLOAT16", True)
    whole = cache.decoded_room(torch.device("cpu"))
    module, x = ffn("8", "8", wide=5), torch.randn(60, D_MODEL)
    with torch.enable_grad():
        module.requires_grad_(False)(x)  # branch by branch
    module(x)
    kept = whole - cache.decoded_room(x.device)
    assert kept == 4 * 3 * D_MODEL * 5 * NEURONS * 4
    module(x[:1])
    assert whole - cache.decoded_room(x.device) == kept
    # Not while others are made, either: there is room for one and a half.
    cache.set_decoded_limit(kept * 3 // 2)
    try:
        module._branches()[0].up.codes.bitwise_not_()
        assert error(module(x), exact(module, x)) < 1e-5
        assert not module.merged.is_empty
    finally:
        cache.set_decoded_limit(None)


@torch.no_grad()
def test_a_wrapped_branch_is_not_left_out() -> None:
    for tokens in (1, 60):
        module, x = ffn("4", "4", wide=5), torch.randn(tokens, D_MODEL)
        wanted = exact(module, x)
        module.branches[1] = nn.Sequential(module.branches[1])
        assert error(module(x), wanted) < ROUNDED


@torch.no_grad()
def test_torchs_newer_switches_do_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising() -> str:
        raise RuntimeError("checking the matmul precision without a specific backend name")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", raising)
    for kinds in (("4",), ("8",), ("dense", "low_rank")):
        module = ffn(*kinds, wide=5)
        for tokens in (1, 60):
            x = torch.randn(tokens, D_MODEL)
            assert error(module(x), exact(module, x)) < ROUNDED


@torch.no_grad()
def test_fits_and_scores_are_the_same_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FAST_BFLOAT16", True)
    merged_one, alone, x = ffn("4", wide=5), ffn("4", gated=False, wide=5), torch.randn(60, D_MODEL)
    for module in (merged_one, alone):
        assert error(module(x), exact(module, x)) > 1e-4
        with exact_products():
            assert error(module(x), exact(module, x)) < 1e-5
            with exact_products(wanted=False):
                assert error(module(x), exact(module, x)) > 1e-4
        assert error(module(x), exact(module, x)) > 1e-4


@needs_int4
@torch.no_grad()
def test_few_and_many_tokens_in_turns_keep_both_forms() -> None:
    module, few, many = ffn("4", "4", wide=5).bfloat16(), torch.randn(2, D_MODEL), torch.randn(60, D_MODEL)
    made = []
    for x in (few, many, few, many):
        x = x.bfloat16()
        assert error(module(x), exact(module, x)) < ROUNDED
        made.append(dict(module.merged._made))
    assert made[1] == made[2] == made[3]
    assert set(made[1]) == {False, True}
    assert module.merged.get(few, module._branches()) is not None
    assert set(module.merged._made) == {False}, "what was made for another dtype is gone"


def test_gradients_reach_biases_weights_and_inputs() -> None:
    for kinds in (("8", "4"), ("dense", "low_rank")):
        module = ffn(*kinds).bfloat16()
        x = torch.randn(2, D_MODEL).bfloat16().requires_grad_(True)
        module(x).float().square().sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
        assert x.grad is not None
        assert module.merged.is_empty
        x = x.detach()
        module.zero_grad()
        module(x).float().square().sum().backward()  # inputs without gradient, biases with
        assert all(parameter.grad is not None for parameter in module.parameters())


@needs_int4
@pytest.mark.parametrize("kinds", [("8", "4"), ("dense", "low_rank")], ids="+".join)
@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.load_state_dict({n: t.flip(0) for n, t in module.state_dict().items()}),
        lambda module: module.load_state_dict({n: t.flip(0) for n, t in module.state_dict().items()}, assign=True),
        lambda module: [tensor.copy_(tensor.flip(0)) for tensor in (*module.parameters(), *module.buffers())],
        lambda module: setattr(module.branches[0], "up", module.branches[0].gate),
        lambda module: setattr(module.branches[0], "act", nn.ReLU()),
        lambda module: setattr(
            module.branches[0], "up_bias", nn.Parameter(torch.ones_like(module.branches[0].up_bias))
        ),
        lambda module: setattr(module.branches[0], "gate_bias", None),
        lambda module: module.branches.__setitem__(0, mirrored(module.branches[0])),
    ],
)
@torch.no_grad()
def test_merged_matrices_follow_the_stored_ones(kinds: tuple[str, ...], change: Any) -> None:
    module = ffn(*kinds).bfloat16()
    x = torch.randn(2, D_MODEL).bfloat16()
    before = module(x)
    names = set(module.state_dict())
    assert names == set(ffn(*kinds).state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.merged.is_empty
        assert torch.equal(other(x), before)
    change(module)
    found = module(x)
    assert error(found, exact(module, x)) < ROUNDED
    assert error(found, before.double()) > 0.1
    module.float()
    assert module.merged.is_empty


@needs_int4
@torch.no_grad()
def test_merged_matrices_follow_the_number_of_branches() -> None:
    module, x = ffn("4", "4").bfloat16(), torch.randn(2, D_MODEL).bfloat16()
    module(x)
    module.branches.append(ffn("4").bfloat16().branches[0])
    assert error(module(x), exact(module, x)) < ROUNDED
    del module.branches[0]
    assert error(module(x), exact(module, x)) < ROUNDED


@torch.no_grad()
def test_export_with_any_number_of_tokens_sees_the_branches() -> None:
    module = ffn("4", "4")
    x = torch.randn(3, D_MODEL)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=1)},))
    more = torch.randn(70, D_MODEL)
    torch.testing.assert_close(program.module()(more).double(), exact(module, more), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_on_a_gpu_floats_are_merged_for_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, room = torch.device("cuda"), 1 << 30
    monkeypatch.setattr(merging, "decoded_room", lambda _device: room)
    for kinds in (("dense", "low_rank"), ("low_rank", "dense", "low_rank")):
        module, x = ffn(*kinds), torch.randn(60, D_MODEL)
        branches = module._branches()
        made = merging.merge(branches, x.dtype, gpu)
        assert made is not None
        assert made.most_tokens > 1 << 40
        assert len(made.inner) == len(made.outer) == 1
        found = merged._run(x, made) + module.bias
        assert error(found, exact(module, x)) < 1e-5
    assert merging.merge(ffn("dense", "4")._branches(), torch.bfloat16, gpu) is None, "int4 kernels are of the CPU"
    alone = ffn("low_rank")
    made = merging.merge(alone._branches(), x.dtype, gpu)
    assert made is not None
    assert len(made.inner) == 2
    kept = [product.matrix for product in (*made.inner, *made.outer)]
    stored = {parameter.data_ptr() for parameter in alone.parameters()}
    assert all(isinstance(matrix, Tensor) and matrix.data_ptr() in stored for matrix in kept), "nothing is copied"
    assert error(merged._run(x, made) + alone.bias, exact(alone, x)) < 1e-5
    room = 1000
    with pytest.raises(merging.NoRoom):
        merging.merge(branches, torch.float32, gpu)


@torch.no_grad()
def test_nothing_is_merged_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = ffn("dense", "low_rank").bfloat16(), torch.randn(2, D_MODEL).bfloat16()
    capturing = True
    monkeypatch.setattr(merged, "is_capturing", lambda _device: capturing)
    assert module.merged.get(x, module._branches()) is None
    assert module.merged.is_empty
    capturing = False
    made = module.merged.get(x, module._branches())
    capturing = True
    assert module.merged.get(x, module._branches()) is made is not None


@torch.no_grad()
def test_layers_that_took_a_projections_place_are_called() -> None:
    for dtype, tokens in ((torch.float32, 60), (torch.bfloat16, 2)):
        module, x = ffn("dense", "4", wide=5).to(dtype), torch.randn(tokens, D_MODEL).to(dtype)
        wrapped = nn.Linear(D_MODEL, 5 * NEURONS, bias=False, dtype=dtype)
        module._branches()[0].up = wrapped
        first, second = (branch(x) for branch in module._branches())
        torch.testing.assert_close(module(x), first + second + module.bias, rtol=2e-2, atol=2e-2)
        assert module.merged.is_empty


@torch.no_grad()
def test_a_sum_of_nothing_is_its_bias() -> None:
    module = SumFFN(D_MODEL, [], bias=torch.randn(D_MODEL))
    for tokens in (1, 60):
        assert torch.equal(module(torch.randn(tokens, D_MODEL)), module.bias.expand(tokens, -1))


def test_hooks_inside_are_seen() -> None:
    module = ffn("dense", "low_rank")
    assert not merged._have_hooks(module._branches())
    for inside in (module._branches()[1], module._branches()[0].down):
        for register in (inside.register_forward_hook, inside.register_forward_pre_hook):
            handle = register(lambda *_: None)
            assert merged._have_hooks(module._branches())
            handle.remove()
    assert not merged._have_hooks(module._branches())


@torch.no_grad()
def test_a_bias_that_is_no_parameter_any_more_is_added() -> None:
    x = torch.randn(3, D_MODEL)
    for make in (
        lambda module: prune.identity(module, "bias"),
        lambda module: parametrize.register_parametrization(module, "bias", nn.Identity()),
    ):
        module = ffn("dense")
        wanted = exact(module, x)
        make(module)
        assert error(module(x), wanted) < 1e-5


@torch.no_grad()
def test_biases_of_neurons_that_are_no_parameters_are_read_at_every_forward() -> None:
    module, x = ffn("dense", "dense").bfloat16(), torch.randn(2, D_MODEL).bfloat16()
    branch = module._branches()[0]
    bias = branch.up_bias.detach()
    del branch.up_bias
    branch.up_bias = bias  # type: ignore[assignment]
    first = module(x)
    branch.up_bias = bias + 1  # type: ignore[assignment]
    assert error(module(x), first.double()) > 0.1
    assert module.merged.is_empty


@needs_int4
@torch.no_grad()
def test_codes_are_merged_where_no_decoded_matrix_may_be_kept() -> None:
    kept, x = ffn("4", "4", wide=5), torch.randn(60, D_MODEL)
    kept(x)
    module = ffn("4", "4", wide=5)
    cache.set_decoded_limit(0)  # less than is kept already
    try:
        assert cache.decoded_room(x.device) < 0
        module(x[:1])
        assert not module.merged.is_empty
    finally:
        cache.set_decoded_limit(None)


@needs_few_int8
@torch.no_grad()
def test_copies_for_few_tokens_are_not_made_twice() -> None:
    module = ffn("w8a8", "w8a8", wide=48, bias=False)
    small, large = (cpu_int8.most_merged(branch.up.spec.shape) for branch in module._branches())
    assert (small, large) == (cpu_int8.FEW_OF_SMALL, cpu_int8.FEW)
    seen = []
    for tokens in (1, large + 1, small, 1, small + 1):
        module(torch.randn(tokens, D_MODEL))
        seen.append(resident_bytes(module))
    weights = sum(p.codes.nbytes for b in module._branches() for p in (b.up, b.gate, b.down))
    assert seen[-1] - seen[0] < 1.05 * weights, "one copy for few tokens and one for many"


@torch.no_grad()
def test_a_stored_matrix_that_stands_alone_is_not_copied() -> None:
    module = ffn("4", gated=False, wide=5)
    branch, x = module._branches()[0], torch.randn(60, D_MODEL)
    branch.up = Dense(matrix(5 * NEURONS, D_MODEL))
    stored = resident_bytes(module)
    assert error(module(x), exact(module, x)) < ROUNDED
    assert resident_bytes(module) - stored <= 4 * 5 * NEURONS * D_MODEL


@torch.no_grad()
def test_matrices_that_are_no_parameters_are_not_merged() -> None:
    for kind, name in (("dense", "weight"), ("low_rank", "b")):
        module = ffn(kind, wide=5)
        projection = module._branches()[0].up
        value = getattr(projection, name).detach()
        delattr(projection, name)
        setattr(projection, name, value)
        assert merging.merge(module._branches(), torch.float32, torch.device("cuda")) is None


@torch.no_grad()
def test_hooks_inside_run_for_more_than_a_handful_of_tokens() -> None:
    for kinds in (("w8a8",), ("4",)):
        module, seen = ffn(*kinds, wide=5), []
        module._branches()[0].up.register_forward_hook(lambda *_, seen=seen: seen.append(True))
        module(torch.randn(merged.HOOKS_FROM + 1, D_MODEL))
        assert seen
