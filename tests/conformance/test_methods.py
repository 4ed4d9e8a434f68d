"""Every registered method, one protocol: a method that is added is tested here as soon as it has cases."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import ffsplit
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.budgets import average_bits
from ffsplit.methods.registry import methods
from tests.conformance.examples import Examples
from tests.tiny import VOCABULARY, tiny

FAMILIES = ("llama", "gpt2", "opt", "bert-mlm", "phi3")

CASES: dict[str, list[dict[str, Any]]] = {
    file.stem: yaml.safe_load(file.read_text(encoding="utf-8"))
    for file in sorted((Path(__file__).parent / "cases").glob("*.yaml"))
}
"""One file a method; the first case runs on every family, all of them on Llama."""
FULL_BUDGETS = {"keep": 1.0, "bits": 16.0, "sparsity": 0.0}
FULL = [(name, {budget: FULL_BUDGETS[budget]}) for name, method in methods().items() for budget in method.budget]
ALL = [(name, case) for name, cases in CASES.items() for case in cases]
FIRST = [(name, cases[0]) for name, cases in CASES.items()] + [("ffsplit", CASES["ffsplit"][3])]


GATED_ONLY = ("bilinear",)
PLAIN = ("gpt2", "opt", "bert-mlm")


def on(*families: str) -> list[tuple[str, str, dict[str, Any]]]:
    """The first settings of every method on the families that it supports."""
    return [(f, *pair) for f in families for pair in FIRST if not (f in PLAIN and pair[0] in GATED_ONLY)]


def label(value: object) -> str:
    if isinstance(value, dict):
        return "-".join(f"{key}={item}" for key, item in value.items())
    return str(value)


def ids(rows: int = 6, columns: int = 32) -> Tensor:
    return torch.randint(5, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(1))


def compressed(family: str, name: str, case: dict[str, Any], **options: Any) -> ffsplit.CompressionResult:
    return ffsplit.compress(
        options.pop("model", None) or tiny(family),
        recipe={"method": {"method": name, **case}},
        calibration=ids(),
        device="cpu",
        **options,
    )


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    return Examples(compressed, tmp_path_factory)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor | None = None) -> Tensor:
    return model(input_ids=ids() if tokens is None else tokens).logits


def sums(model: nn.Module) -> list[SumFFN]:
    return [module for module in model.modules() if isinstance(module, SumFFN)]


def assert_same(found: Tensor, expected: Tensor, saved: ffsplit.SavedCheckpoint) -> None:
    """Equal to the bit; a stock model may multiply fused matrices and then rounds differently."""
    if saved.kind == "stock":
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, expected)


def dense_ffn(spec: SumSpec) -> bool:
    """Whether the sum is some dense FFN of the model's kind, however its matrices are stored."""
    exact = spec.linear is spec.lookup is spec.skip is None and not spec.rounds_inputs
    return exact and all(b.selector is None and b.act == "model" for b in spec.branches)


def test_every_method_has_cases() -> None:
    assert set(CASES) == set(methods())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "case"), FULL, ids=label)
def test_a_full_budget_changes_nothing(family: str, name: str, case: dict[str, Any]) -> None:
    result = compressed(family, name, case)
    torch.testing.assert_close(logits(result.model), logits(tiny(family)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("name", GATED_ONLY)
def test_a_method_for_gated_ffns_says_so_before_any_work(family: str, name: str) -> None:
    with pytest.raises(ffsplit.RecipeError, match=f"method {name} needs gated FFNs"):
        compressed(family, name, CASES[name][0])


@pytest.mark.parametrize(
    ("family", "name", "case"),
    [("llama", *pair) for pair in ALL] + on(*FAMILIES[1:]),
    ids=label,
)
def test_the_budget_is_met_and_the_plan_is_kept(
    family: str, name: str, case: dict[str, Any], examples: Examples
) -> None:
    result = examples.result(family, name, case)
    assert len(sums(result.model)) == len(result.plan.ffns) == 2
    for planned, module in zip(result.plan.ffns, sums(result.model), strict=True):
        shape = planned.dense_shape
        assert module.spec == planned.spec
        assert sum(p.numel() for n, p in module.named_parameters() if "act." not in n) <= planned.spec.parameters
        if "keep" in case:
            assert planned.spec.parameters <= case["keep"] * shape.parameters
            assert planned.spec.parameters >= 0.8 * case["keep"] * shape.parameters
        elif "bits" in case:
            assert average_bits(planned.spec, shape) <= case["bits"]
    assert bool(torch.isfinite(logits(result.model)).all())


@pytest.mark.parametrize(("name", "case"), ALL, ids=label)
def test_stored_bits_are_really_stored(name: str, case: dict[str, Any], examples: Examples) -> None:
    """The bits that a plan counts are the bits of the tensors, up to the width of floats."""
    result = examples.result("llama", name, case)
    for planned, module in zip(result.plan.ffns, sums(result.model), strict=True):
        state = {n: t for n, t in module.state_dict().items() if ".act." not in n and t.numel()}
        assert sum(8 * t.numel() * t.element_size() for t in state.values()) == planned.spec.stored_bits(32)


@pytest.mark.parametrize(("family", "name", "case"), on(*FAMILIES), ids=label)
def test_save_and_reload_give_the_same_bits(
    family: str, name: str, case: dict[str, Any], examples: Examples, tmp_path: Path
) -> None:
    result = examples.result(family, name, case)
    before = logits(result.model)
    saved = examples.checkpoint(family, name, case)
    loaded = type(result.model).from_pretrained(saved.directory).eval()
    assert_same(logits(loaded), before, saved)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(type(loaded).from_pretrained(tmp_path / "again").eval()), logits(loaded))


@pytest.mark.parametrize(("family", "name", "case"), on(*FAMILIES), ids=label)
def test_without_the_import_loading_raises_or_is_right(
    family: str, name: str, case: dict[str, Any], examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = examples.result(family, name, case)
    before = logits(result.model)
    saved = examples.checkpoint(family, name, case)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "ffsplit")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "ffsplit")
    if saved.kind == "stock":
        assert_same(logits(type(result.model).from_pretrained(saved.directory).eval()), before, saved)
    else:
        with pytest.raises(RuntimeError, match="mismatched_sizes"):
            type(result.model).from_pretrained(saved.directory)


@pytest.mark.parametrize(("family", "name", "case"), on("llama", "gpt2", "opt", "phi3"), ids=label)
def test_generation_with_the_cache_equals_generation_without(
    family: str, name: str, case: dict[str, Any], examples: Examples
) -> None:
    model = examples.result(family, name, case).model
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    with_cache = model.generate(**prompt, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(**prompt, use_cache=False, **options))
    assert with_cache.shape == (2, 15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "case"), FIRST, ids=label)
def test_half_precision(
    dtype: torch.dtype, name: str, case: dict[str, Any], examples: Examples, tmp_path: Path
) -> None:
    tiny("llama").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    result = compressed("llama", name, case, model=model)
    out = logits(result.model)
    assert out.dtype == dtype
    assert bool(torch.isfinite(out).all())
    reference = logits(examples.result("llama", name, case).model)
    assert float((out.float() - reference).norm() / reference.norm()) < 0.1
    saved = ffsplit.save(result, tmp_path / "out")
    loaded = type(result.model).from_pretrained(saved.directory, dtype=dtype).eval()
    assert_same(logits(loaded), out, saved)


@pytest.mark.parametrize(("name", "case"), ALL, ids=label)
def test_compile_autocast_and_gradients(name: str, case: dict[str, Any], examples: Examples) -> None:
    module = sums(examples.result("llama", name, case).model)[0]
    x = torch.randn(3, 5, module.d_model, generator=torch.Generator().manual_seed(0))
    expected = module(x)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(x).float()
    if any(branch.selector for branch in module.branches):
        # A choice near its threshold falls the other way: single outputs jump, the whole hardly moves.
        assert float((found - expected).norm() / expected.norm()) < 0.1
    else:
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05 * float(expected.abs().max()))
    trainable = [p for n, p in module.named_parameters() if "act." not in n]
    constant = not module.branches and module.linear is None
    wanted = trainable if constant else [x, *trainable]
    if not wanted:
        assert not module(x).any()
        return
    for tensor in wanted:
        tensor.requires_grad_(True)
    try:
        gradients = torch.autograd.grad(module(x).square().sum(), wanted)
        assert all(bool(torch.isfinite(g).all()) and float(g.abs().sum()) > 0 for g in gradients)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(False)


@pytest.mark.parametrize(("name", "case"), ALL, ids=label)
def test_packed_tensors_survive_a_cast(name: str, case: dict[str, Any], examples: Examples) -> None:
    module = copy.deepcopy(sums(examples.result("llama", name, case).model)[0])
    packed = {n: t.clone() for n, t in module.state_dict().items() if not t.is_floating_point()}
    module.to(torch.bfloat16)
    assert all(torch.equal(module.state_dict()[n], t) for n, t in packed.items())


@pytest.mark.parametrize(("family", "name", "case"), on(*FAMILIES), ids=label)
def test_decompress_gives_a_stock_model_with_the_same_outputs(
    family: str, name: str, case: dict[str, Any], examples: Examples, tmp_path: Path
) -> None:
    kind = type(examples.result(family, name, case).model)
    model = kind.from_pretrained(examples.checkpoint(family, name, case).directory).eval()
    if not hasattr(model.config, "quantization_config"):
        assert not sums(model)
        return
    if not all(dense_ffn(module.spec) for module in sums(model)):
        expected = r"linear map|some tokens only|without an activation|rounds its inputs|lookup tables"
        with pytest.raises(ffsplit.ModelError, match=expected):
            ffsplit.decompress(model)
        return
    dense = ffsplit.decompress(model)
    assert not sums(dense)
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path / "dense")
    assert SumSpec.__name__ not in (tmp_path / "dense" / "config.json").read_text()


@pytest.mark.parametrize(("name", "case"), [pair for pair in FIRST if {"keep", "bits"} & pair[1].keys()], ids=label)
def test_a_better_budget_is_not_worse(name: str, case: dict[str, Any], examples: Examples) -> None:
    """More resources, less error on the calibration inputs."""
    richer = dict(case)
    for field, factor in (("keep", 1.4), ("bits", 1.5), ("sparsity", 0.5), ("light", 0.5)):
        if field in richer:
            richer[field] = richer[field] * factor
    if richer == case:  # a method without a budget
        return
    results = (examples.result("llama", name, case), compressed("llama", name, richer))
    errors = [sum(layer["output_error"] for layer in result.report["layers"]) for result in results]
    assert errors[1] < errors[0]
