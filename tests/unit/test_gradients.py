"""Gradients of the loss per neuron: against autograd's weight gradients, and through methods and planners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import ffsplit
from ffsplit.calibrate.gradients import NeuronGradients, collect_gradients
from ffsplit.errors import DataError, ModelError, RecipeError
from ffsplit.families import find_ffns
from ffsplit.families.projection import get_weight
from ffsplit.methods.neurons import GRADIENT_SCORES, neuron_scores
from ffsplit.methods.registry import method_config
from tests.conformance.test_methods import ids
from tests.tiny import tiny
from tests.unit.test_neurons import make_layer

CPU = torch.device("cpu")


def collect(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> dict[str, NeuronGradients]:
    return collect_gradients(model, find_ffns(model).sites, batches, CPU)


def loud(family: str) -> PreTrainedModel:
    """In double precision, with FFNs and heads whose gradients are no rounding noise."""
    model = tiny(family).double()
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def batches_of(family: str) -> list[dict[str, Tensor]]:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    tokens = ids(4, 12)
    batches = [{"input_ids": tokens[:2], "attention_mask": mask}, {"input_ids": tokens[2:]}]
    if family == "t5":
        batches = [{**batch, "decoder_input_ids": batch["input_ids"].flip(1)[:, :7]} for batch in batches]
    return batches


def reference_loss(family: str, model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    logits, total = model(**batch).logits, torch.zeros((), dtype=torch.float64)
    for row in range(len(logits)):
        for place in range(logits.shape[1]):
            mask = batch.get("attention_mask")
            if family == "t5":
                label = int(logits[row, place].argmax())
            elif family == "bert-mlm":
                if mask is not None and not mask[row, place]:
                    continue
                label = int(logits[row, place].argmax())
            else:
                if place + 1 == logits.shape[1] or (mask is not None and not mask[row, place + 1]):
                    continue
                label = int(batch["input_ids"][row, place + 1])
            total = total + cross_entropy(logits[row, place][None], torch.tensor([label]))
    return total


def by_neuron(site: Any, products: dict[str, tuple[Tensor, Tensor | None]]) -> Tensor:
    """Products of parameters and gradients, summed over what each neuron owns."""
    total = products[site.down][0].sum(0)
    for path in dict.fromkeys([site.up, *([site.gate] if site.gate else [])]):
        weight, bias = products[path]
        total = total + weight.sum(1).view(-1, site.d_ff).sum(0)
        if bias is not None:
            total = total + bias.view(-1, site.d_ff).sum(0)
    return total


def weight_products(model: PreTrainedModel, site: Any) -> dict[str, tuple[Tensor, Tensor | None]]:
    """``w dL/dw`` of a site's projections, in the layout [out, in]."""
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for path in site.projections:
        module = model.get_submodule(path)
        values = get_weight(module)
        gradient = module.weight.grad.T if values[0].shape != module.weight.shape else module.weight.grad
        if type(module).__name__ == "Conv1D":
            gradient = module.weight.grad.T
        bias = None if values[1] is None else values[1] * module.bias.grad
        found[path] = (values[0] * gradient, bias)
    return found


@pytest.mark.parametrize("family", ["llama", "llama-biased", "phi3", "gpt2", "opt", "bert-mlm", "t5"])
def test_sums_are_those_of_autograd(family: str) -> None:
    model = loud(family)
    batches = batches_of(family)
    found = collect(model, batches)
    sites = find_ffns(model).sites
    group = {site.name: torch.zeros(site.d_ff, dtype=torch.float64) for site in sites}
    sizes = {site.name: torch.zeros(site.d_ff, dtype=torch.float64) for site in sites}
    for batch in batches:
        for row in range(2):
            one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            model.zero_grad()
            reference_loss(family, model, one).backward()
            for site in sites:
                products = weight_products(model, site)
                group[site.name] += by_neuron(site, products)
                absolute = {p: (w.abs(), None if b is None else b.abs()) for p, (w, b) in products.items()}
                sizes[site.name] += by_neuron(site, absolute)
    for site in sites:
        for mine, expected in ((found[site.name].group, group), (found[site.name].elementwise, sizes)):
            scale = float(expected[site.name].abs().max())
            assert scale > 1e-3
            torch.testing.assert_close(mine, expected[site.name], rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_mask_sums_are_gradients_of_masks(family: str) -> None:
    model = loud(family).requires_grad_(False)
    sites = find_ffns(model).sites
    masks = {site.name: torch.ones(site.d_ff, dtype=torch.float64, requires_grad=True) for site in sites}
    found = collect(model, [{"input_ids": ids(3, 12)}])
    expected = {site.name: torch.zeros(site.d_ff, dtype=torch.float64) for site in sites}
    for site in sites:
        model.get_submodule(site.down).register_forward_pre_hook(
            lambda _m, args, name=site.name: (args[0] * masks[name],)
        )
    for row in ids(3, 12):
        loss = reference_loss(family, model, {"input_ids": row[None]})
        for site, gradient in zip(sites, torch.autograd.grad(loss, list(masks.values())), strict=True):
            expected[site.name] += gradient.abs()
    for site in sites:
        torch.testing.assert_close(found[site.name].mask, expected[site.name], rtol=1e-4, atol=1e-6)


def test_batches_and_padding_do_not_matter() -> None:
    model = loud("llama")
    tokens = ids(4, 12)
    one = collect(model, [{"input_ids": tokens}])
    split = collect(model, [{"input_ids": tokens[:1]}, {"input_ids": tokens[1:]}])
    wide = torch.cat([tokens, torch.full((4, 5), 7)], dim=1)
    mask = torch.cat([torch.ones(4, 12), torch.zeros(4, 5)], dim=1).long()
    padded = collect(model, [{"input_ids": wide, "attention_mask": mask}])
    for name, gradients in one.items():
        for field in ("group", "elementwise", "mask"):
            for other in (split, padded):
                expected, value = getattr(gradients, field), getattr(other[name], field)
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_dead_neurons_have_no_gradient() -> None:
    model = loud("llama")
    model.model.layers[0].mlp.up_proj.weight.data[[2, 5]] = 0
    sums = next(iter(collect(model, [{"input_ids": ids(2, 12)}]).values()))
    for tensor in (sums.group, sums.elementwise, sums.mask):
        assert (tensor == 0).nonzero().flatten().tolist() == [2, 5]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    collect(model, [{"input_ids": ids(2, 8)}])
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["gemma2", "cohere", "falcon", "modernbert", "bart", "roberta-classifier", "phi"])
def test_other_families(family: str) -> None:
    model = loud(family).float()
    batch = {"input_ids": ids(2, 12)}
    for gradients in collect(model, [batch]).values():
        assert float(gradients.group.abs().max()) > 0
        assert bool((gradients.elementwise * (1 + 1e-6) + 1e-9 >= gradients.group.abs()).all())


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("bert", "BertModel returns no logits: load the model with its head"),
        ("electra", r"logits of ElectraForPreTraining, of shape \[1, 8\], are no scores of classes"),
    ],
)
def test_no_loss(family: str, message: str) -> None:
    recipe = {"method": {"method": "prune", "keep": 0.5, "score": "taylor"}}
    model = tiny(family)
    with pytest.raises(ModelError, match=message):
        ffsplit.compress(model, recipe=recipe, calibration=ids(2, 8), device="cpu")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_overflow_is_refused() -> None:
    model = tiny("llama")
    model.lm_head.weight.data.fill_(float("inf"))
    with pytest.raises(DataError, match=r"the gradient sum group holds NaN or Inf"):
        collect(model, [{"input_ids": ids(2, 8)}])


@pytest.mark.parametrize("score", sorted(GRADIENT_SCORES))
def test_a_score_without_gradients_is_refused(score: Any) -> None:
    data = make_layer()
    data.gradients = None
    with pytest.raises(RecipeError, match=f"score='{score}' needs gradients"):
        neuron_scores(data, score)


def test_who_needs_gradients() -> None:
    assert method_config({"method": "prune", "keep": 0.5, "score": "taylor"}).needs_gradients
    assert method_config({"method": "ffsplit", "keep": 0.5, "score": "mask_gradient"}).needs_gradients
    assert not method_config({"method": "prune", "keep": 1.0, "score": "taylor"}).needs_gradients
    assert not method_config({"method": "prune", "keep": 0.5}).needs_gradients


def pruned(recipe: dict[str, Any], **options: Any) -> ffsplit.CompressionResult:
    return ffsplit.compress(loud("llama").float(), recipe=recipe, calibration=ids(), device="cpu", **options)


def test_the_neurons_kept_are_those_of_the_dense_models_gradients(tmp_path: Path) -> None:
    """Layers after the first are scored by the dense model too, and a killed run goes on with the same scores."""
    recipe = {"method": {"method": "prune", "width": 20, "score": "taylor", "refit": False}}
    found = collect(loud("llama").float(), [{"input_ids": row[None]} for row in ids()])
    result = pruned(recipe, journal=tmp_path / "journal")
    for layer, gradients in enumerate(found.values()):
        best = gradients.group.abs().argsort(descending=True)[:20]
        up = loud("llama").float().model.layers[layer].mlp.up_proj.weight[best]
        assert torch.equal(result.model.model.layers[layer].mlp.branches[0].up.weight, up)
    (tmp_path / "journal" / "ffn-0001.safetensors").unlink()
    again = pruned(recipe, journal=tmp_path / "journal")
    for one, other in zip(result.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_planners_score_by_gradients() -> None:
    result = pruned({"method": {"method": "flap", "keep": 0.6, "score": "taylor_elementwise"}})
    assert 0.58 < result.plan.keep <= 0.6
    prune = {"method": "prune", "score": "mask_gradient"}
    chosen = pruned({"method": {"method": "auto", "keep": 0.7, "methods": [prune], "windows": 2, "trials": 1}})
    assert chosen.plan.keep <= 0.7
