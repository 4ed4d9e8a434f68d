"""FFN Fusion: side by side means the sum of the members on one input, and what cannot be fused is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import ffsplit
from ffsplit.budget.fusion import runs_of
from ffsplit.errors import ModelError, RecipeError
from ffsplit.families import DroppedAttention, drop_attention, find_attention, find_ffns
from ffsplit.ffn.sum import SumFFN
from ffsplit.ffn.weights import FFNWeights, side_by_side
from tests.conformance.test_planners import ids
from tests.tiny import tiny
from tests.unit.checkpoint_helpers import outputs

NORMS = {"llama": "post_attention_layernorm", "gpt2": "ln_2", "starcoder2": "post_attention_layernorm"}


def dense(family: str) -> PreTrainedModel:
    """Four layers, norms with weights of their own."""
    config = tiny(family).config
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    model = type(tiny(family))(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    return model


def fused(family: str, model: PreTrainedModel | None = None, **settings: Any) -> ffsplit.CompressionResult:
    """Whatever may be fused is, unless the settings have a tolerance."""
    recipe = {"method": {"method": "ffn-fusion", "count": 4, "tol": None, **settings}, "fold_norms": True}
    return ffsplit.compress(model or dense(family), recipe=recipe, calibration=ids(), device="cpu")


def loud(*layers: int) -> PreTrainedModel:
    """A Llama in which some FFNs give much: what the second of two gives then depends on the first."""
    model = dense("llama")
    with torch.no_grad():
        for index in layers:
            layers_of(model)[index].mlp.down_proj.weight.mul_(30.0)
    return model


def layers_of(model: PreTrainedModel) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@torch.no_grad()
def side_by_side_by_hand(family: str, run: tuple[int, ...], model: PreTrainedModel | None = None) -> PreTrainedModel:
    """A model without attention, where the FFNs of a run, each behind its norm, see one stream."""
    model = model or dense(family)
    for site in find_attention(model, find_ffns(model)).sites:
        drop_attention(model, site)
    layers = layers_of(model)
    stream: list[Tensor] = []
    members = [(getattr(layers[index], NORMS[family]), layers[index].mlp, layers[index].mlp.forward) for index in run]
    norms = [norm.forward for norm, _, _ in members]
    members[0][0].register_forward_pre_hook(lambda _module, args: stream.append(args[0]))

    def together(_x: Tensor) -> Tensor:
        return torch.stack([ffn(norm(stream[-1])) for (_, _, ffn), norm in zip(members, norms, strict=True)]).sum(0)

    for place, (_, mlp, _) in enumerate(members):
        mlp.forward = torch.zeros_like if place else together
    return model


@torch.no_grad()
def stream_after(model: PreTrainedModel, layer: int, **batch: Tensor) -> Tensor:
    """What a layer gives."""
    kept: list[Tensor] = []
    handle = layers_of(model)[layer].register_forward_hook(lambda _module, _args, output: kept.append(output))
    model(**batch)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "starcoder2"])
def test_a_fused_run_is_the_sum_of_its_members_on_one_input(family: str, tmp_path: Path) -> None:
    result = fused(family, longest=3)
    model, wanted = result.model, outputs(side_by_side_by_hand(family, (0, 1, 2)))
    torch.testing.assert_close(outputs(model), wanted, rtol=1e-4, atol=1e-4)
    neurons = [layer.mlp.spec.neurons if isinstance(layer.mlp, SumFFN) else None for layer in layers_of(model)]
    assert neurons == [240, 0, 0, None]
    loaded = type(model).from_pretrained(ffsplit.save(result, tmp_path / "out").directory)
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_error_is_the_distance_of_the_streams(family: str) -> None:
    """Of the model that fuses nothing and the one that fuses by hand, behind the run's last member."""
    tried = fused(family, tol=10.0).report["decision"]["tried"]
    assert [len(trial["ffns"]) for trial in tried] == [2, 3, 4]
    for trial in tried:
        members = tuple(range(len(trial["ffns"])))
        alone, together = (
            stream_after(side_by_side_by_hand(family, run), members[-1], input_ids=ids()) for run in ((0,), members)
        )
        wanted = ((together - alone).norm(dim=-1) / alone.norm(dim=-1)).mean()
        assert trial["error"] == pytest.approx(float(wanted), rel=1e-4)
        assert trial["within"]


def test_a_run_is_cut_where_the_error_exceeds_the_tolerance() -> None:
    free = fused("llama", loud(2, 3), tol=10.0).report["decision"]
    assert free["unfused"] == {}
    small, large = (free["tried"][place]["error"] for place in (1, 2))
    assert large > 2 * small
    decision = fused("llama", loud(2, 3), tol=(small + large) / 2).report["decision"]
    assert decision["fused"] == [[f"model.layers.{index}.mlp" for index in range(3)]]
    assert [trial["within"] for trial in decision["tried"]] == [True, True, False]
    assert decision["tried"] == [{**trial, "within": number < 2} for number, trial in enumerate(free["tried"])]
    (name, why), *others = decision["unfused"].items()
    assert (name, others) == ("model.layers.3.mlp", [])
    assert why.startswith(f"fused with 0, 1, 2 it moves the stream by {large:.3g}, above tol=")


def test_after_a_cut_the_next_run_starts() -> None:
    decision = fused("llama", loud(0, 1), tol=0.2).report["decision"]
    assert decision["fused"] == [[f"model.layers.{index}.mlp" for index in (1, 2, 3)]]
    assert list(decision["unfused"]) == ["model.layers.0.mlp"]


def test_a_run_as_long_as_allowed_leaves_the_rest_alone_and_says_so() -> None:
    decision = fused("llama", tol=10.0, longest=3).report["decision"]
    assert [len(run) for run in decision["fused"]] == [3]
    assert decision["unfused"] == {"model.layers.3.mlp": "the run before it is as long as longest allows"}


def test_nothing_within_the_tolerance_is_refused_with_what_was_measured() -> None:
    model = dense("llama")
    with pytest.raises(ModelError, match=r"within tol=1e-07.*\[0, 1\]: 0\.\d+, \[1, 2\]: .*drop-ffns"):
        fused("llama", model, tol=1e-7)
    assert not any(isinstance(module, DroppedAttention) for module in model.modules())


def test_padding_does_not_count() -> None:
    """The same sentences, alone and beside padding of other ids."""
    recipe = {"method": {"method": "ffn-fusion", "count": 4, "tol": 10.0}, "fold_norms": True}
    padded = {"input_ids": ids(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    padded["attention_mask"][1, 5:] = 0
    alone = [{"input_ids": padded["input_ids"][:1]}, {"input_ids": padded["input_ids"][1:, :5]}]
    found = [
        ffsplit.compress(dense("llama"), recipe=recipe, calibration=batches, device="cpu").report["decision"]["tried"]
        for batches in ([padded], alone)
    ]
    for one, other in zip(*found, strict=True):
        assert one["error"] == pytest.approx(other["error"], rel=1e-4)


def test_what_the_report_says() -> None:
    result = fused("llama", count=3, protect_first=1)
    assert result.report["budget"]["keep_ffn"] == 1.0
    decision = result.report["decision"]
    assert decision["fused"] == [[f"model.layers.{index}.mlp" for index in range(4)]]
    assert decision["dropped"] == [f"model.layers.{index}.self_attn" for index in (1, 2, 3)]
    assert "tried" not in decision
    assert {layer["output_error"] for layer in result.report["layers"]} == {None}
    assert isinstance(result.model.get_submodule("model.layers.1.self_attn"), DroppedAttention)


def test_only_neighbours_without_attention_between_them_are_fused() -> None:
    result = fused("llama", count=1, protect_first=2, protect_last=1)
    assert result.report["decision"]["fused"] == [["model.layers.1.mlp", "model.layers.2.mlp"]]


@torch.no_grad()
def test_generation_with_the_cache_equals_generation_without() -> None:
    model = fused("gpt2", count=3, protect_last=1).model
    prompt = {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long), "max_new_tokens": 8}
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(**prompt, **options), model.generate(**prompt, **options, use_cache=False))


def test_runs_are_cut() -> None:
    pairs = [True, True, False, True, True, True]
    assert runs_of(pairs, None) == [(0, 1, 2), (3, 4, 5, 6)]
    assert runs_of(pairs, 2) == [(0, 1), (3, 4), (5, 6)]
    assert runs_of(pairs, 3) == [(0, 1, 2), (3, 4, 5)]
    assert runs_of([False, False], None) == []


def test_side_by_side_is_the_sum() -> None:
    generator = torch.Generator().manual_seed(0)

    def ffn(gated: bool) -> FFNWeights:
        up, gate, down = (torch.randn(shape, generator=generator) for shape in ((6, 4), (6, 4), (4, 6)))
        bias, last = torch.randn(6, generator=generator), torch.randn(4, generator=generator)
        return FFNWeights(up, down, torch.nn.SiLU(), gate if gated else None, bias, bias if gated else None, last)

    x = torch.randn(5, 4, generator=generator)
    for gated in (True, False):
        several = [ffn(gated) for _ in range(3)]
        wanted = torch.stack([one(x) for one in several]).sum(0)
        torch.testing.assert_close(side_by_side(several)(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "fold"), [("llama", False), ("gemma2", False), ("gemma2", True), ("olmo2", False), ("bert-mlm", False)]
)
def test_models_whose_ffns_see_different_inputs_are_refused(family: str, fold: bool) -> None:
    """Norms with weights of their own, or behind the FFN."""
    model = tiny("gemma2") if family == "gemma2" else dense(family)
    if family == "gemma2":
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    recipe = {"method": {"method": "ffn-fusion", "count": 2}, "fold_norms": fold}
    with pytest.raises(ModelError, match="see the same input"):
        ffsplit.compress(model, recipe=recipe, calibration=ids(), device="cpu")
    assert not any(isinstance(module, DroppedAttention) for module in model.modules())


def test_what_cannot_be_reached_is_refused() -> None:
    with pytest.raises(RecipeError, match="only 3 of 4 attentions may go"):
        fused("llama", protect_first=1)
    with pytest.raises(RecipeError, match="no two FFNs follow each other"):
        fused("llama", count=1, protect_last=3)


def test_an_override_must_not_split_a_run() -> None:
    recipe = {
        "method": {"method": "ffn-fusion", "count": 4},
        "fold_norms": True,
        "overrides": [{"ffns": "0", "method": None}],
    }
    with pytest.raises(RecipeError, match="is fused with FFNs 0, 1, 2, 3"):
        ffsplit.compress(dense("llama"), recipe=recipe, calibration=ids(), device="cpu")


def test_fused_layers_have_no_dense_form(tmp_path: Path) -> None:
    result = fused("llama")
    folder = ffsplit.save(result, tmp_path / "out").directory
    with pytest.raises(ModelError, match="holds 320 neurons, of several FFNs"):
        ffsplit.decompress(type(result.model).from_pretrained(folder))
