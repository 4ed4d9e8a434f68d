"""Folding norms: the same outputs, plain norms afterwards, and a reason wherever it cannot be done."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedModel

import ffsplit
from ffsplit.errors import ModelError
from ffsplit.families import norms
from ffsplit.families.norms import fold_norms
from ffsplit.pipeline.decide import _store
from ffsplit.pipeline.journal import Journal
from ffsplit.pipeline.recipe import load_recipe
from tests.conformance.test_methods import ids, logits
from tests.tiny import tiny
from tests.unit.cli_fixtures import Call


def scaled(family: str) -> PreTrainedModel:
    """A tiny model in double precision whose norms are no identities and whose FFNs matter."""
    model = tiny(family).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.3 * noise if parameter.dim() == 1 else 0.1 * noise
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The norms of most families compute in float32, whatever the weights are in.
@pytest.mark.parametrize(
    ("family", "fed", "offset"),
    [
        ("llama", ["gate_proj", "up_proj"], 0),
        ("phi3", ["gate_up_proj"], 0),
        ("gemma2", ["gate_proj", "up_proj"], 1),
        ("gpt2", ["c_fc"], 0),
        ("opt", ["fc1"], 0),
        ("cohere", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], 0),
        ("phi", ["q_proj", "k_proj", "v_proj", "fc1"], 0),
        ("falcon", ["query_key_value", "dense_h_to_4h"], 0),
        ("esm", ["dense"], 0),
    ],
)
def test_the_model_computes_the_same(family: str, fed: list[str], offset: int) -> None:
    model = scaled(family)
    before, old = logits(model), state(model)
    folds = fold_norms(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    assert len(folds) == 2
    changed = set()
    for fold in folds:
        assert fold.refused is None
        assert [path.rpartition(".")[2] for path in fold.projections] == fed
        norm = model.get_submodule(fold.norm)
        assert bool((norm.weight == 1 - offset).all())
        assert getattr(norm, "bias", None) is None or not bool(norm.bias.any())
        changed |= {fold.norm, *fold.projections}
    new = state(model)
    assert {name.rpartition(".")[0] for name in old if not torch.equal(old[name], new[name])} == changed


@pytest.mark.parametrize("family", ["t5-v1.1", "whisper", "clip", "vit", "gemma3", "modernbert", "m2m100"])
def test_other_kinds_of_models(family: str) -> None:
    """`fold_norms` compares every projection's output by itself."""
    folds = fold_norms(scaled(family))
    assert len(folds) >= 2
    assert all(fold.refused is None for fold in folds)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bert", r"its output also goes into aten.add in encoder.layer.0.output"),
        ("openai-gpt", r"ln_1: its output also goes into aten.add in transformer.h.0"),
        ("stablelm", r"it has a bias, and model.layers.0.mlp.gate_proj has none"),
        ("olmo", r"it has no weights to fold"),
        ("olmo2", r"model.layers.0.mlp: no module alone makes its input"),
    ],
)
def test_refused_with_the_reason_and_left_alone(family: str, reason: str) -> None:
    model = scaled(family)
    old = state(model)
    with pytest.raises(ModelError, match=reason):
        fold_norms(model)
    assert same(state(model), old)


def test_a_bias_of_zeros_is_no_bias() -> None:
    model = scaled("stablelm")
    model.model.layers[0].post_attention_layernorm.bias.data.zero_()
    before = logits(model)
    first, second = fold_norms(model)
    assert first.refused is None
    assert "has a bias" in str(second.refused)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


@pytest.mark.parametrize(
    ("reader", "operation"),
    [
        (lambda x, model: x.sigmoid(), "aten.sigmoid"),
        (lambda x, model: x[:, -1:], "aten.slice"),
        (lambda x, model: x.unflatten(-1, (4, 8)), "aten.view"),
        (lambda x, model: linear(x, model.lm_head.weight), "aten.mm"),
    ],
)
def test_one_more_reader_of_the_norm_is_seen(reader: Any, operation: str) -> None:
    model = scaled("llama")
    norm = model.model.layers[0].post_attention_layernorm
    norm.register_forward_hook(lambda _module, _args, output: [reader(output, model)] and output)
    folds = fold_norms(model)
    assert f"its output also goes into {operation} in model.layers.0" in str(folds[0].refused)
    assert folds[1].refused is None


def test_a_projection_used_on_something_else_is_seen() -> None:
    model = scaled("llama")
    layer, other = model.model.layers[0], torch.ones(1, 2, 32, dtype=torch.float64)

    def use(*_: object) -> None:
        layer.mlp.up_proj(other)

    layer.register_forward_hook(use)
    assert "mlp.up_proj is also used on other inputs" in str(fold_norms(model)[0].refused)


def test_a_norm_that_the_model_returns_is_left_alone() -> None:
    model, seen = scaled("llama"), []
    model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda _m, _a, output: seen.append(output))
    model.register_forward_hook(lambda _m, _a, output: {"logits": output.logits, "normed": seen[-1]})
    assert fold_norms(model)[0].refused == "its output is also returned by the model"


def test_a_weight_that_two_modules_share_is_left_alone() -> None:
    model = scaled("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    with pytest.raises(ModelError, match=r"layers.0.mlp.up_proj.weight is shared with another module"):
        fold_norms(model)


def test_other_outputs_put_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scaled("llama")
    old, right = state(model), norms._absorb

    def wrong(model: Any, norm: nn.Module, affine: Any, fed: Any, changed: Any) -> None:
        right(model, norm, affine, fed, changed)
        weight = model.get_submodule(fed[0]).weight.detach()
        weight.mul_(1.01)

    monkeypatch.setattr(norms, "_absorb", wrong)
    with pytest.raises(ModelError, match=r"folding its norms changes what it returns by 0\.0"):
        fold_norms(model)
    assert same(state(model), old)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = scaled("llama").to(dtype)
    before = logits(model)
    fold_norms(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert float((logits(model) - before).float().norm() / before.float().norm()) < 0.03


def test_no_zero_divides() -> None:
    model = scaled("llama")
    model.model.layers[0].post_attention_layernorm.weight.data[::3] = 0
    before = logits(model)
    fold_norms(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_the_result_is_a_plain_checkpoint(tmp_path: Path) -> None:
    model = scaled("llama").float()
    ffsplit.fold_norms(model)
    model.save_pretrained(tmp_path / "folded")
    assert "quantization_config" not in (tmp_path / "folded" / "config.json").read_text()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()), logits(model))


def compressed(method: dict[str, Any], fold: bool) -> ffsplit.CompressionResult:
    model = scaled("llama").float()
    # The input's Gram then has full rank with room to spare.
    tokens = torch.cat([ids(), ids().flip(0) + 1]) % 128
    return ffsplit.compress(model, recipe={"method": method, "fold_norms": fold}, calibration=tokens, device="cpu")


def test_what_methods_see() -> None:
    """Whitened factors weigh errors by the inputs, so folding is the same to them; plain SVD weighs weights alone."""
    whitened = {"method": "whitened-svd", "keep": 0.6, "refit": False}
    plain, folded = compressed(whitened, False), compressed(whitened, True)
    scale = float(logits(plain.model).abs().max())
    torch.testing.assert_close(logits(plain.model), logits(folded.model), rtol=0, atol=2e-2 * scale)
    svd = {"method": "svd", "keep": 0.6}
    difference = logits(compressed(svd, False).model) - logits(compressed(svd, True).model)
    assert float(difference.abs().max()) > 0.1 * scale


def test_a_recipe_folds_first_and_says_so(tmp_path: Path) -> None:
    result = compressed({"method": "prune", "keep": 0.5}, True)
    assert result.recipe.fold_norms
    assert [entry["norm"] for entry in result.report["folded_norms"]] == [
        f"model.layers.{layer}.post_attention_layernorm" for layer in range(2)
    ]
    assert ffsplit.save(result, tmp_path / "out").kind == "stock"
    assert compressed({"method": "prune", "keep": 0.5}, False).report["folded_norms"] == []


def test_options_of_python_and_the_command_line(cli: Call, llama: Path, tmp_path: Path) -> None:
    model = scaled("llama").float()
    result = ffsplit.compress(model, recipe="svd", keep=0.5, calibration=ids(), device="cpu", fold_norms=True)
    assert len(result.report["folded_norms"]) == 2
    options = ("--recipe", "svd", "--keep", "0.5", "--samples", "2", "--seq-len", "16", "--device", "cpu")
    outcome = cli("compress", llama, "--out", tmp_path / "out", *options, "--fold-norms", "--json")
    assert outcome.code == 0, outcome.err
    assert "fold_norms: true" in (tmp_path / "out" / "ffsplit_recipe.yaml").read_text()


def test_a_resumed_run_folds_again(tmp_path: Path) -> None:
    """The journal belongs to the model as it came; FFNs that it holds were fitted to the folded one."""
    recipe = {"method": {"method": "quantize", "code_bits": 4, "group": 16}, "fold_norms": True}
    options: dict[str, Any] = {"recipe": recipe, "calibration": ids(), "device": "cpu", "journal": tmp_path / "journal"}
    first = ffsplit.compress(scaled("llama").float(), **options)
    (tmp_path / "journal" / "ffn-0001.safetensors").unlink()
    again = ffsplit.compress(copy.deepcopy(scaled("llama").float()), **options)
    assert torch.equal(logits(first.model), logits(again.model))


def test_measurements_of_a_folded_model_are_kept_apart(tmp_path: Path) -> None:
    def folder(fold: bool) -> Path:
        identity = {"model": "m", "data": "d", "dtype": "torch.float32", "versions": {"torch": "2"}}
        job: Any = SimpleNamespace(identity=lambda: identity, recipe=load_recipe("prune", keep=0.5, fold_norms=fold))
        return _store(job, Journal(tmp_path / "journal", {}), tmp_path / "measured")

    assert folder(False) == folder(False) != folder(True)
