"""The tracer on odd forwards, and what it leaves behind in the model: nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ffsplit.errors import ModelError
from ffsplit.families import check_finite, find_ffns, read, verify
from ffsplit.families.tree import module_tree
from tests.tiny import tiny

Forward = Callable[["Odd", Tensor], Tensor]


class OddConfig(PreTrainedConfig):
    model_type = "ffsplit-odd"

    def __init__(self, fused: bool = False, **kwargs: object) -> None:
        self.vocab_size, self.hidden_size, self.fused = 32, 8, fused
        super().__init__(**kwargs)


class Odd(PreTrainedModel):
    """An embedding and a few projections, wired up by a function."""

    config_class = OddConfig

    def __init__(self, config: OddConfig, wiring: Forward) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(32, 8)
        self.up = nn.Linear(8, 24 if config.fused else 12)
        self.gate = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.inner_norm = nn.LayerNorm(12)
        self.act = nn.GELU()
        self.wiring = wiring

    def forward(self, input_ids: Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.wiring(self, self.embedding(input_ids)))


def odd(wiring: Forward, **config: bool) -> Odd:
    torch.manual_seed(0)
    return Odd(OddConfig(**config), wiring).eval()


FOUND: dict[str, Forward] = {
    "post norm": lambda m, x: x + m.norm(m.down(m.act(m.up(x)))),
    "in place": lambda m, x: m.down(m.act(m.up(x))).add_(x),
    "dropout and casts": lambda m, x: x + m.down(nn.functional.dropout(m.act(m.up(x)), 0.5, m.training).float()),
    "flattened tokens": lambda m, x: (x.reshape(-1, 8) + m.down(m.act(m.up(x.reshape(-1, 8))))).view(x.shape),
    "layer scale": lambda m, x: torch.addcmul(x, m.down(m.act(m.up(x))), m.norm.weight),
    "token by token": lambda m, x: x + torch.cat([m.down(m.act(m.up(part))) for part in x.split(1, dim=1)], dim=1),
}
NOT_FOUND: dict[str, Forward] = {
    "no activation": lambda m, x: x + m.down(m.up(x)),
    "a norm in between": lambda m, x: x + m.down(m.inner_norm(m.act(m.up(x)))),
    "two inputs": lambda m, x: x + m.down(m.act(m.gate(x)) * m.up(m.norm(x))),
    "two activations": lambda m, x: x + m.down(m.act(m.gate(x)) * torch.tanh(m.up(x))),
    "another activation mixed in": lambda m, x: x + m.down(m.act(m.up(x)) * x.mean(-1, keepdim=True)),
    "a reversed half": lambda m, x: x + m.down(m.act(m.up(x)).flip(-1)),
    "no residual": lambda m, x: m.down(m.act(m.up(x))),
    "softmax over neurons": lambda m, x: x + m.down(m.up(x).softmax(-1)),
}
REFUSED: dict[str, tuple[Forward, str]] = {
    "a function": (lambda m, x: x + m.down(torch.relu(m.up(x))), "a function before it"),
    "a shared activation": (lambda m, x: m.act(x) + m.down(m.act(m.up(x))), "a shared activation module before it"),
    "an unknown function": (lambda m, x: x + m.down(torch.sin(m.up(x))), "has no known name"),
    "a scaled activation": (lambda m, x: x + m.down(m.act(3 * m.up(x))), "has no known name"),
    "a gate": (lambda m, x: x + m.down(m.act(m.gate(x)) * m.up(x)), "a gate before it"),
}


@pytest.mark.parametrize("name", FOUND)
def test_an_ffn_is_found_through(name: str) -> None:
    model = odd(FOUND[name])
    ffns = find_ffns(model)
    (site,) = ffns.sites
    assert (site.up, site.down, site.act, site.d_model, site.d_ff) == ("up", "down", "act", 8, 12)
    assert ffns.calls["up"] == (8 if name == "token by token" else 1)
    verify(model, ffns.sites)


@pytest.mark.parametrize("name", NOT_FOUND)
def test_no_ffn_is_seen_in(name: str) -> None:
    with pytest.raises(ModelError, match="no FFN found"):
        find_ffns(odd(NOT_FOUND[name]))


@pytest.mark.parametrize("name", REFUSED)
def test_an_ffn_that_cannot_be_replaced_is_named(name: str) -> None:
    wiring, reason = REFUSED[name]
    with pytest.raises(ModelError, match=f"no FFN found(.|\n)*down: .*{reason}"):
        find_ffns(odd(wiring))


class GatedMLP(nn.Module):
    """Both orders of a fused projection, or an activation by function, in a module of its own."""

    def __init__(self, act_first: bool) -> None:
        super().__init__()
        self.both = nn.Linear(8, 24)
        self.down = nn.Linear(12, 8)
        self.act_first = act_first

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.both(x).chunk(2, dim=-1)
        gate, up = (first, second) if self.act_first else (second, first)
        return self.down(nn.functional.silu(gate) * up)


@pytest.mark.parametrize(("act_first", "fused"), [(True, "gate_up"), (False, "up_gate")])
def test_the_order_of_fused_halves_is_seen(act_first: bool, fused: str) -> None:
    model = odd(lambda m, x: x + m.mlp(x))
    model.mlp = GatedMLP(act_first)
    ffns = find_ffns(model)
    (site,) = ffns.sites
    assert (site.name, site.kind, site.fused, site.act) == ("mlp", "module", fused, None)
    assert site.act_name in ("silu", "swish")
    verify(model, ffns.sites)
    gate_rows = model.mlp.both.weight[:12] if act_first else model.mlp.both.weight[12:]
    gate = read(model, site).gate
    assert gate is not None
    assert torch.equal(gate, gate_rows)


def test_a_module_that_holds_more_than_the_ffn_is_not_replaced() -> None:
    model = odd(lambda m, x: x + m.mlp(x))
    model.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    assert find_ffns(model).sites[0].kind == "module"
    model.mlp.adapter = None
    model.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    (site,) = find_ffns(model).sites
    assert (site.kind, site.name, site.act, site.down) == ("inline", "mlp.1", "mlp.2", "mlp.3")


def test_a_prediction_head_of_three_projections_is_no_ffn() -> None:
    def wiring(m: Odd, x: Tensor) -> Tensor:
        return x + m.down(m.act(m.up(x))) + m.c(torch.relu(m.b(torch.relu(m.a(x)))))

    model = odd(wiring)
    model.a, model.b, model.c = (nn.Linear(8, 8) for _ in range(3))
    assert [site.down for site in find_ffns(model).sites] == ["down"]


def test_an_ffn_that_did_not_run_is_uncovered(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    model.config.num_hidden_layers = 1
    model.model.config.num_hidden_layers = 1
    with caplog.at_level(logging.WARNING, logger="ffsplit.families.find"):
        ffns = find_ffns(model)
    assert len(ffns.sites) == 1
    assert ffns.coverage.covered_share_of_ffn == 0.5
    assert "model.layers.1.mlp.up_proj" in caplog.text


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("bart")
    model.train()
    model.model.encoder.eval()
    training = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    find_ffns(model)
    assert [module.training for module in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert hooks(model) == 0
    assert all(parameter.requires_grad for parameter in model.parameters())


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("work", [find_ffns, lambda model: verify(model, find_ffns(tiny("llama")).sites)])
def test_hooks_are_removed_when_the_forward_fails(work: Callable[[PreTrainedModel], object]) -> None:
    model = tiny("llama").train()

    def fail(*_args: object, **_kwargs: object) -> None:
        raise ValueError("the norm is broken")

    model.model.norm.forward = fail
    with pytest.raises(ModelError, match="the norm is broken"):
        work(model)
    assert hooks(model) == 0
    assert all(module.training for module in model.modules())


def test_given_inputs_are_used() -> None:
    model = tiny("llama")
    ids = torch.tensor([[3, 4, 5]])
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    assert len(find_ffns(model, {"input_ids": ids}).sites) == 2
    handle.remove()
    assert len(seen) == 1
    assert seen[0] is ids


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-mlm", "t5", "whisper", "apertus", "vit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = tiny(name).to(dtype)
    ffns = find_ffns(model)
    assert ffns.sites == find_ffns(tiny(name)).sites
    verify(model, ffns.sites)


def test_t5_with_its_output_projection_in_float32() -> None:
    model = tiny("t5-v1.1").to(torch.bfloat16)
    for site in find_ffns(model).sites:
        model.get_submodule(site.down).float()
    sites = find_ffns(model).sites
    verify(model, sites)
    assert {model.get_submodule(site.down).weight.dtype for site in sites} == {torch.float32}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    model = tiny("gpt2")
    sites = find_ffns(model).sites
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 4] = value
    with pytest.raises(ModelError, match=r"transformer\.h\.1\.mlp\.c_proj\.weight: 1 of 2560 values"):
        check_finite(model, sites)
    with pytest.raises(ModelError, match="NaN or infinite"):
        verify(model, sites)


def test_an_ffn_that_computes_something_else_is_named() -> None:
    model = tiny("llama")
    sites = find_ffns(model).sites
    model.model.layers[1].mlp.act_fn.forward = torch.tanh
    verify(model, sites[:1])
    model.model.layers[1].mlp.forward = lambda x: (
        2 * type(model.model.layers[1].mlp).forward(model.model.layers[1].mlp, x)
    )
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda _m, _a, out: 3 * out)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp: .*differs from its FFN weights by"):
        verify(model, sites)


def test_the_module_tree_is_cut() -> None:
    deep = nn.Sequential(*(nn.Linear(1, size + 1) for size in range(100)))
    lines = module_tree(deep, lines=10).splitlines()
    assert len(lines) == 10
    assert lines[-1] == "... 92 more lines"
