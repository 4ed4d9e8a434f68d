"""Projections that are stored once, by another FFN."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ffsplit.errors import ModelError
from ffsplit.families import link_ties
from ffsplit.ffn.projections import Dense, LowRank, Packed, Projection, Tied, TiedSpec, tied
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import Branch, SumFFN
from ffsplit.ops.rounding import round_to_nearest

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def spec_of(place: str = "up", rank: int = 2, owner: str = "layers.0", rows: int = 6, columns: int = 4) -> TiedSpec:
    return TiedSpec.model_validate({"shape": (rows, columns), "owner": owner, "projection": place, "rank": rank})


def owner_sum() -> SumFFN:
    return SumFFN(4, [Branch(nn.SiLU(), Dense(random(6, 4)), Dense(random(4, 6)), Dense(random(6, 4)))])


def member_sum(owner: str = "layers.0", rank: int = 2) -> SumFFN:
    def part(place: str, rows: int, columns: int) -> Tied:
        factors = (random(rows, rank), random(rank, columns)) if rank else (None, None)
        return Tied(spec_of(place, rank, owner, rows, columns), None, *factors)

    return SumFFN(4, [Branch(nn.SiLU(), part("up", 6, 4), part("down", 4, 6), part("gate", 6, 4), up_bias=random(6))])


class Model(nn.Module):
    base_model_prefix = "model"

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


def linked(rank: int = 2) -> Model:
    model = Model(owner_sum(), member_sum(rank=rank))
    link_ties(model)
    return model


def owners() -> list[Projection]:
    codes, grid = round_to_nearest(random(6, 4), 4, 4)
    return [Dense(random(6, 4)), LowRank(random(6, 2), random(2, 4)), Packed.from_codes(codes, grid, bits=4, group=4)]


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("owner", owners(), ids=lambda owner: owner.spec.kind)
@pytest.mark.parametrize("tokens", [0, 5])
def test_it_is_the_owner_plus_the_difference(owner: Projection, rank: int, tokens: int) -> None:
    a, b = (random(6, rank), random(rank, 4)) if rank else (None, None)
    projection, x = Tied(spec_of(rank=rank), owner, a, b), random(tokens, 4)
    weight = owner.dense(torch.float64)
    if a is not None and b is not None:
        weight = weight + a.double() @ b.double()
    torch.testing.assert_close(projection.dense(torch.float64), weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(projection(x), (x.double() @ weight.T).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("owner", owners(), ids=lambda owner: owner.spec.kind)
def test_weights_of_another_device_are_fetched(owner: Projection, monkeypatch: pytest.MonkeyPatch) -> None:
    projection, x = Tied(spec_of(), owner, random(6, 2), random(2, 4)), random(5, 4)
    here = projection(x)
    assert projection.to("meta")(x.to("meta")).device.type == "meta"  # the owner stayed on the CPU
    projection = Tied(projection.spec, owner, *(t.detach() for t in (random(6, 2), random(2, 4))))
    here = projection(x)
    monkeypatch.setattr(tied, "device_of", lambda _: torch.device("meta"))
    torch.testing.assert_close(projection(x), here)


def test_only_the_difference_is_counted_and_stored(tmp_path: Path) -> None:
    model = linked()
    module = model.layers[1]
    assert isinstance(module, SumFFN)
    stored = {name: tensor for name, tensor in module.state_dict().items() if tensor.numel()}
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in module.parameters())
    assert sum(t.numel() for t in stored.values()) == module.spec.parameters == 3 * 2 * (6 + 4) + 6
    assert module.spec.stored_bits(32) == 32 * module.spec.parameters
    assert module.spec.macs == 3 * (6 * 4 + 2 * (6 + 4))
    assert len(list(model.parameters())) == 3 + 7
    save_file(model.state_dict(), tmp_path / "all.safetensors")  # refuses tensors that share memory
    again = Model(owner_sum(), SumFFN.empty(module.spec, nn.SiLU(), torch.float32, "cpu"))
    again.load_state_dict(load_file(tmp_path / "all.safetensors"))
    link_ties(again)
    x = random(5, 4)
    assert torch.equal(again.layers[1](x), module(x))


def test_without_a_difference_nothing_is_stored() -> None:
    module = linked(rank=0).layers[1]
    assert isinstance(module, SumFFN)
    assert [name for name, _ in module.named_parameters()] == ["branches.0.up_bias"]
    assert SumSpec.model_validate_json(module.spec.model_dump_json()) == module.spec


def test_a_cast_reaches_the_owner_once() -> None:
    model = linked().to(torch.bfloat16)
    x = random(5, 4).bfloat16()
    assert model.layers[1](x).dtype == torch.bfloat16
    owner, member = (layer.branches[0].up for layer in model.layers)
    assert member.owner is owner
    assert owner.weight.dtype == torch.bfloat16


def test_a_copy_is_tied_inside_itself() -> None:
    model, x = linked(), random(5, 4)
    before = model.layers[1](x)
    other = copy.deepcopy(model)
    assert other.layers[1].branches[0].up.owner is other.layers[0].branches[0].up
    torch.nn.init.zeros_(other.layers[0].branches[0].down.weight)
    assert torch.equal(model.layers[1](x), before)
    assert not torch.allclose(other.layers[1](x), before)


def test_compile_autocast_and_gradients() -> None:
    model, x = linked(), random(3, 5, 4).requires_grad_(True)
    expected = model.layers[1](x)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model.layers[1], backend="eager", fullgraph=True)(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.layers[1](x).dtype == torch.bfloat16
    gradients = torch.autograd.grad(expected.square().sum(), [x, *model.parameters()])
    assert all(bool(torch.isfinite(g).all()) and float(g.abs().sum()) > 0 for g in gradients)


def test_what_was_never_linked_does_not_run() -> None:
    with pytest.raises(ModelError, match=r"layers\.0 \(branch 0, up\) and was never linked"):
        member_sum()(random(2, 4))


def test_owners_of_another_shape_and_tied_ones_are_refused() -> None:
    with pytest.raises(ModelError, match=r"shape \(6, 4\) is tied to .* whose shape is \(5, 4\)"):
        Tied(spec_of(rank=0), Dense(random(5, 4)))
    first = Tied(spec_of(rank=0), Dense(random(6, 4)))
    with pytest.raises(ModelError, match="tied itself"):
        Tied(spec_of(rank=0), first)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(nn.Linear(4, 4), member_sum("elsewhere")), r"layers\.1 is tied to elsewhere, which Model does not have"),
        (Model(nn.Linear(4, 4), member_sum()), "is a Linear and no compressed FFN"),
        (Model(SumFFN(4), member_sum()), "up of branch 0 of layers.0, which has none"),
        (
            Model(SumFFN(4, [Branch(nn.SiLU(), Dense(random(6, 4)), Dense(random(4, 6)))]), member_sum()),
            "gate of branch 0 of layers.0, which has none",
        ),
        (Model(owner_sum(), member_sum("layers.1")), "tied itself"),
    ],
    ids=["absent", "dense", "dropped", "plain", "itself"],
)
def test_a_missing_owner_is_an_error(model: Model, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        link_ties(model)


@pytest.mark.parametrize("owner", ["model.layers.0", "layers.0"])
def test_a_path_with_or_without_the_prefix_is_found(owner: str) -> None:
    bare = Model(owner_sum(), member_sum(owner))
    link_ties(bare)
    wrapped = nn.Module()
    wrapped.base_model_prefix = "model"  # type: ignore[assignment]
    wrapped.model = Model(owner_sum(), member_sum(owner))
    link_ties(wrapped)
    assert wrapped.model.layers[1].branches[0].up.owner is wrapped.model.layers[0].branches[0].up
