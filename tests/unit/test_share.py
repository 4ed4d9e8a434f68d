"""Layers that share one FFN: fitted, stored once, loaded, resumed and refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import ffsplit
from ffsplit.budget.registry import entry_config
from ffsplit.errors import BudgetError, CheckpointError, RecipeError
from ffsplit.ffn.projections import Tied
from ffsplit.methods.registry import all_methods, methods
from ffsplit.pipeline import fit as fit_module
from tests.conformance.test_methods import FAMILIES, ids, logits, sums
from tests.tiny import VOCABULARY, tiny
from tests.unit.checkpoint_helpers import edit_config

PAIR: dict[str, Any] = {"method": "share", "keep": 0.8, "protect_first": 0, "protect_last": 0}


def deep(layers: int = 5) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:  # norms differ between layers, as they do in a trained model
        torch.nn.init.uniform_(layer.post_attention_layernorm.weight, 0.5, 1.5)
    return model


def shared(model: PreTrainedModel | str, method: dict[str, Any], **options: Any) -> ffsplit.CompressionResult:
    recipe = {"method": {**PAIR, **method}, **options.pop("recipe", {})}
    dense = tiny(model) if isinstance(model, str) else model
    return ffsplit.compress(dense, recipe=recipe, calibration=ids(), device="cpu", **options)


def errors(result: ffsplit.CompressionResult) -> list[float]:
    return [layer["output_error"] for layer in result.report["layers"]]


@pytest.mark.parametrize("method", [{}, {"tie": "all", "merge": "average", "match": "weights"}], ids=["inner", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_stored_once_and_comes_back(
    family: str, method: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = shared(family, method)
    dense = sum(ffn.dense_shape.parameters for ffn in result.plan.ffns)
    stored = sum(module.spec.parameters for module in sums(result.model))
    assert 0.9 * PAIR["keep"] * dense <= stored <= PAIR["keep"] * dense
    assert len({id(p) for module in sums(result.model) for p in module.parameters()}) == sum(
        len(list(module.parameters())) for module in sums(result.model)
    )
    before = logits(result.model)
    saved = ffsplit.save(result, tmp_path / "out")
    assert saved.kind == "ffsplit"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(tensor.numel() for name, tensor in tensors.items() if ".branches." in name) <= stored
    loaded = type(result.model).from_pretrained(saved.directory).eval()
    assert torch.equal(logits(loaded), before)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(type(loaded).from_pretrained(tmp_path / "again").eval()), before)
    dense_again = ffsplit.decompress(loaded)
    assert not sums(dense_again)
    torch.testing.assert_close(logits(dense_again), before, rtol=1e-4, atol=1e-4)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "ffsplit")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "ffsplit")
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        type(result.model).from_pretrained(saved.directory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    deep().save_pretrained(tmp_path / "dense")
    result = shared(LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype), {})
    before = logits(result.model)
    ffsplit.save(result, tmp_path / "out")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()), before)


def test_generation_with_the_cache_equals_generation_without() -> None:
    model = shared("llama", {}).model
    prompt = {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(
        model.generate(**prompt, use_cache=True, **options), model.generate(**prompt, use_cache=False, **options)
    )


def relatives(difference: float) -> PreTrainedModel:
    """Two layers: the second has the first one's neurons, permuted, some turned in sign, plus a rank 1 difference."""
    model = deep(2)
    first, second = (layer.mlp for layer in model.model.layers)
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(64, generator=generator)
    sign = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)

    def near(weight: torch.Tensor) -> torch.Tensor:
        rows, columns = (torch.randn(size, generator=generator) for size in weight.shape)
        return weight + difference * weight.norm() * torch.outer(rows / rows.norm(), columns / columns.norm())

    with torch.no_grad():
        second.gate_proj.weight.copy_(near(first.gate_proj.weight)[order])
        second.up_proj.weight.copy_(near(first.up_proj.weight)[order] * sign[:, None])
        second.down_proj.weight.copy_(near(first.down_proj.weight)[:, order] * sign)
    return model


@pytest.mark.parametrize("match", ["activations", "weights"])
def test_neurons_are_matched(match: str) -> None:
    """In the owner's order the difference has rank 1, so that sharing loses nothing; in any other it does not."""
    expected, method = logits(relatives(0.2)), {"tie": "all", "rank": 1, "keep": 0.6}
    result = shared(relatives(0.2), {**method, "match": match})
    torch.testing.assert_close(logits(result.model), expected, rtol=1e-3, atol=1e-4)
    assert max(errors(result)) < 1e-3
    assert max(errors(shared(relatives(0.2), {**method, "match": "none"}))) > 0.05


@pytest.mark.parametrize("tie", ["inner", "all"])
@pytest.mark.parametrize("match", ["activations", "weights"])
def test_the_mean_of_equal_layers_is_each_of_them(match: str, tie: str) -> None:
    result = shared(relatives(0.0), {"tie": tie, "match": match, "merge": "average", "rank": 0})
    torch.testing.assert_close(logits(result.model), logits(relatives(0.0)), rtol=1e-3, atol=1e-4)
    assert max(errors(result)) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("merge", ["owner", "average"])
def test_a_down_of_its_own_is_never_worse(family: str, merge: str) -> None:
    settings = {"rank": 2, "merge": merge, "keep": 0.9}
    inner, everything = (errors(shared(family, {**settings, "tie": tie})) for tie in ("inner", "all"))
    assert inner[1] <= everything[1] + 1e-6
    assert inner[0] <= everything[0] + 1e-6


def test_more_rank_less_error() -> None:
    found = [errors(shared("llama", {"rank": rank, "keep": 0.99}))[1] for rank in (0, 4, 8, 12)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.9 * found[0]


def test_groups_owners_and_protected_layers() -> None:
    result = shared(deep(7), {"keep": 0.9, "group": 3, "protect_first": 1, "protect_last": 1, "rank": 1})
    chosen = [ffn.method for ffn in result.plan.ffns]
    assert [config and (config.members, config.place) for config in chosen] == [
        None, ((1, 2, 3), 0), ((1, 2, 3), 1), ((1, 2, 3), 2), ((4, 5), 0), ((4, 5), 1), None,
    ]  # fmt: skip
    assert [len([m for m in module.modules() if isinstance(m, Tied)]) for module in sums(result.model)] == [
        0,
        2,
        2,
        0,
        2,
    ]
    assert errors(result)[0] == errors(result)[3] == 0


def test_similar_layers_are_grouped() -> None:
    model = deep(5)
    layers = [layer.mlp for layer in model.model.layers]
    layers[3].load_state_dict(layers[2].state_dict())
    model.model.layers[3].post_attention_layernorm.load_state_dict(
        model.model.layers[2].post_attention_layernorm.state_dict()
    )
    result = shared(model, {"groups": "similar", "keep": 0.9, "protect_first": 1})
    assert [ffn.method and ffn.method.members for ffn in result.plan.ffns] == [None, None, (2, 3), (2, 3), None]


def test_encoder_and_decoder_do_not_share() -> None:
    model = tiny("t5")
    batches = [{"input_ids": ids(2, 8), "decoder_input_ids": ids(2, 8)} for _ in range(4)]
    result = ffsplit.compress(model, recipe={"method": PAIR}, calibration=batches, device="cpu")
    owners = [module.branches[0].up.spec.owner for module in sums(model) if isinstance(module.branches[0].up, Tied)]
    assert [owner.partition(".")[0] for owner in owners] == ["encoder", "decoder"]
    assert result.plan.keep <= 0.8


def test_everything_stays_at_full_budget() -> None:
    result = shared("llama", {"keep": 1.0})
    torch.testing.assert_close(logits(result.model), logits(tiny("llama")), rtol=1e-5, atol=1e-6)


def test_the_smallest_reachable_budget_is_reachable() -> None:
    with pytest.raises(BudgetError, match="smallest reachable keep is") as refused:
        shared(deep(), {"keep": 0.2})
    found = re.search(r"reachable keep is ([\d.]+)", str(refused.value))
    assert found is not None
    smallest = float(found[1])
    result = shared(deep(), {"keep": smallest + 1e-4})
    assert result.plan.keep <= smallest + 1e-4


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"protect_first": 1}, "no two consecutive FFNs of equal shape"),
        ({"rank": 33}, "rank=33: the matrices have rank 32 at most"),
        ({"merge": "average", "match": "none"}, "unmatched neurons have no mean"),
        ({"group": 1}, "group: Input should be greater than or equal to 2"),
    ],
)
def test_what_cannot_work_is_refused_before_text_is_read(method: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ffsplit.compress(tiny("llama"), recipe={"method": {**PAIR, **method}}, calibration="no such file", device="cpu")


def test_an_override_of_an_owner_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"model.layers.1.mlp is tied to model.layers.0.mlp, .* leave both or none"):
        shared("llama", {}, recipe={"overrides": [{"ffns": "0", "method": {"method": "prune", "keep": 0.5}}]})
    with pytest.raises(RecipeError, match="is tied to"):
        shared("llama", {}, recipe={"overrides": [{"ffns": "0", "method": None}]})


def test_a_quantized_owner_is_shared_too(tmp_path: Path) -> None:
    coded = {"method": "quantize", "code_bits": 8, "group": 16}
    result = shared("llama", {}, recipe={"overrides": [{"ffns": "0", "method": coded}]})
    plain = shared("llama", {})
    assert errors(result)[1] == pytest.approx(errors(plain)[1], rel=0.1)
    before = logits(result.model)
    ffsplit.save(result, tmp_path / "out")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()), before)


def test_a_step_of_a_planner_is_no_method_to_name() -> None:
    assert "shared" in all_methods()
    assert "shared" not in methods()
    with pytest.raises(RecipeError, match="unknown method 'shared'"):
        entry_config({"method": "shared", "owner": "x", "members": [0], "place": 0})


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_a_killed_run_goes_on_with_its_ties(finished: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = {"keep": 0.7, "merge": "average"}
    expected = logits(shared(deep(), method).model)
    fits = fit_module._fit
    done: list[int] = []

    def dying(*arguments: Any) -> Any:
        if len(done) == finished:
            raise KeyboardInterrupt
        done.append(0)
        return fits(*arguments)

    monkeypatch.setattr(fit_module, "_fit", dying)
    with pytest.raises(KeyboardInterrupt):
        shared(deep(), method, journal=tmp_path / "journal")
    monkeypatch.setattr(fit_module, "_fit", fits)
    resumed = shared(deep(), method, journal=tmp_path / "journal")
    assert torch.equal(logits(resumed.model), expected)
    first, second = sums(resumed.model)[:2]
    assert second.branches[0].up.owner is first.branches[0].up


def test_it_loads_without_the_head_that_it_was_stored_with(tmp_path: Path) -> None:
    result = shared("bert-mlm", {})
    ffsplit.save(result, tmp_path / "out")
    with torch.no_grad():
        expected = result.model.bert(input_ids=ids()).last_hidden_state
        bare = BertModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
        assert torch.equal(bare(input_ids=ids()).last_hidden_state, expected)
    bare.save_pretrained(tmp_path / "bare")
    back = type(result.model).from_pretrained(tmp_path / "bare")
    torch.testing.assert_close(back.bert(input_ids=ids()).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("owner", "message"),
    [("model.layers.7.mlp", "which LlamaForCausalLM does not have"), ("model.layers.1.mlp", "tied itself"),
     ("model.norm", "no compressed FFN")],
)  # fmt: skip
def test_a_tampered_owner_is_refused(owner: str, message: str, tmp_path: Path) -> None:
    ffsplit.save(shared("llama", {}), tmp_path / "out")

    def change(stored: dict[str, Any]) -> None:
        stored["ffns"][1]["spec"]["branches"][0]["up"]["owner"] = owner

    edit_config(tmp_path / "out", change)
    with pytest.raises(CheckpointError, match=message):
        LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_the_plan_says_who_shares_with_whom(tmp_path: Path) -> None:
    ffsplit.save(shared("llama", {}), tmp_path / "out")
    plan = json.loads((tmp_path / "out" / "ffsplit_plan.json").read_text())
    assert [ffn["method"]["place"] for ffn in plan["ffns"]] == [0, 1]
    assert "tied to model.layers.0.mlp plus rank" in (tmp_path / "out" / "README.md").read_text()


def test_without_text_weights_alone_decide() -> None:
    config = entry_config({**PAIR, "tie": "all", "match": "weights"})
    assert not config.needs_data
    assert entry_config({**PAIR, "match": "weights"}).needs_data
    assert entry_config({**PAIR, "tie": "all", "match": "weights", "groups": "similar"}).needs_data
    found = [
        errors(shared("llama", {"tie": "all", "match": "weights", "keep": 0.95, "rank": rank}))[1] for rank in (2, 16)
    ]
    assert found[1] < found[0]
