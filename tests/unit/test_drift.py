from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertForMaskedLM, PreTrainedModel

import ffsplit
from ffsplit.calibrate.cache import TensorCache
from ffsplit.calibrate.drift import DriftMeter, adds_its_output
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.families import find_ffns, read
from ffsplit.families.forward import evaluating
from tests.tiny import tiny
from tests.unit.evaluate_helpers import build
from tests.unit.family_batches import Batch, family_batches

CPU = torch.device("cpu")
PRE_NORM = ("llama", "gpt2", "opt", "bloom", "falcon", "phi3", "modernbert", "t5", "whisper", "vit")
POST_NORM = ("bert", "distilbert", "deberta-v2", "bart", "marian", "gemma2", "olmo2")
PRUNE = {"method": {"method": "prune", "keep": 0.6}}


def batches_of(family: str) -> list[Batch]:
    return family_batches("llama" if family == "olmo2" else family)


def deep_llama() -> PreTrainedModel:
    """Four layers whose FFNs matter."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64}
    return build("AutoModelForCausalLM", "LlamaConfig", scale=3.0, **sizes)


def ids(seed: int = 1, rows: int = 24) -> Tensor:
    return torch.randint(5, 261, (rows, 32), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def final_state(model: PreTrainedModel) -> Tensor:
    return model.model(input_ids=ids()).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "expected"), [(f, True) for f in PRE_NORM] + [(f, False) for f in POST_NORM])
def test_which_families_add_the_output_to_the_residual_stream(family: str, expected: bool, dtype: torch.dtype) -> None:
    model = tiny(family).to(dtype)
    batches = [
        {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
        for batch in batches_of(family)
    ]
    with torch.no_grad(), evaluating(model), TensorCache() as cache:
        replay = BlockReplay(model, batches, cache, CPU)
        for block in find_ffns(model).blocks:
            assert adds_its_output(replay, block) == expected
            replay.advance(block)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_large_residual_stream_in_half_precision_is_no_norm(dtype: torch.dtype) -> None:
    model = deep_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(300)
        model.model.embed_tokens.weight[:, 3].mul_(30)  # a massive activation
    model.to(dtype)
    with torch.no_grad(), evaluating(model), TensorCache() as cache:
        replay = BlockReplay(model, [{"input_ids": ids(rows=2)}], cache, CPU)
        assert adds_its_output(replay, find_ffns(model).blocks[0])


@pytest.mark.parametrize("family", ["llama", "opt", "t5", "phi3"])
def test_a_correction_brings_the_block_back_to_the_dense_output(family: str) -> None:
    """Added to the FFN's output inside the damaged model, it gives what the dense model gives."""
    model, batches = tiny(family), family_batches(family)
    first, second = find_ffns(model).blocks[:2]
    with torch.no_grad(), evaluating(model), TensorCache() as cache, TensorCache() as drift_cache:
        replay = BlockReplay(model, batches, cache, CPU)
        meter = DriftMeter(replay, drift_cache)
        dense = DriftMeter(replay, drift_cache).dense  # shares the cache: the same stream
        still_dense = meter.corrections(first, measure=True)
        assert still_dense is not None
        assert all(torch.equal(chunk, torch.zeros_like(chunk)) for chunk in still_dense)
        down = model.get_submodule(first.sites[0].down)
        down.weight.mul_(-3)
        replay.advance(first)
        down.weight.div_(-3)
        corrections = meter.corrections(second, measure=True)
        assert corrections is not None
        assert corrections.tokens == sum(_real_tokens(batch) for batch in batches)
        rows = iter(list(corrections))
        assert sum(float(chunk.norm()) for chunk in corrections) > 0.1
        for index, output in replay.outputs(second):
            target = dense.block_output(second, index)
            for moved, wanted in zip(
                replay.rows(index, second.sites[0], output), replay.rows(index, second.sites[0], target), strict=True
            ):
                torch.testing.assert_close(moved + next(rows), wanted, rtol=1e-5, atol=1e-5)


def _real_tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def test_a_share_asks_for_a_part() -> None:
    model, batches = tiny("llama"), family_batches("llama")
    first, second = find_ffns(model).blocks
    found = []
    for share in (1.0, 0.25):
        with torch.no_grad(), evaluating(model), TensorCache() as cache, TensorCache() as drift_cache:
            replay = BlockReplay(model, batches, cache, CPU)
            meter = DriftMeter(replay, drift_cache, share)
            meter.corrections(first, measure=False)
            down = model.get_submodule(first.sites[0].down)
            kept = down.weight.clone()
            down.weight.zero_()
            replay.advance(first)
            down.weight.copy_(kept)
            corrections = meter.corrections(second, measure=True)
            assert corrections is not None
            found.append(torch.cat(list(corrections)))
    torch.testing.assert_close(found[0] * 0.25, found[1])


@pytest.mark.parametrize("method", ["prune", "ffsplit"])
def test_repair_pulls_the_stream_back_to_the_dense_model(method: str) -> None:
    dense = final_state(deep_llama())
    damage = {"method": "prune", "keep": 0.2, "refit": False, "score": "random"}
    errors = []
    for drift in (0.0, 0.5, 1.0):
        recipe: dict[str, Any] = {
            "method": {"method": method, "keep": 0.8},
            "overrides": [{"ffns": "0", "method": damage}],
            "drift": drift,
        }
        model = ffsplit.compress(deep_llama(), recipe=recipe, calibration=ids(), device="cpu").model
        errors.append(float((final_state(model) - dense).norm() / dense.norm()))
    without, half, full = errors
    assert half < 0.85 * without
    assert full < half


def test_repair_works_in_bfloat16() -> None:
    outputs = []
    for drift in (0.0, 1.0):
        model = deep_llama()
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(100)
        recipe = {**PRUNE, "drift": drift}
        made = ffsplit.compress(model.bfloat16(), recipe=recipe, calibration=ids(rows=4), device="cpu").model
        outputs.append(made.model.layers[3].mlp.branches[0].down.weight)
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("family", ["bert", "gemma2", "albert", "xlm"])
def test_where_the_idea_does_not_apply_it_changes_nothing(family: str) -> None:
    states = []
    for drift in (0.0, 1.0):
        recipe = {**PRUNE, "drift": drift}
        made = ffsplit.compress(tiny(family), recipe=recipe, calibration=family_batches(family), device="cpu")
        states.append(made.model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_model_without_blocks_and_with_a_head() -> None:
    """The output of such a model is as wide as its vocabulary, not as its residual stream."""
    torch.manual_seed(0)
    model = AlbertForMaskedLM(tiny("albert").config).eval()
    made = ffsplit.compress(model, recipe={**PRUNE, "drift": 1.0}, calibration=family_batches("albert"), device="cpu")
    assert made.plan.keep < 0.61


@pytest.mark.parametrize("family", ["opt", "llama", "t5", "modernbert"])
@pytest.mark.parametrize("rows", [1, 3])
def test_any_batch_size(family: str, rows: int) -> None:
    """A family may flatten the batch before its FFN (OPT); the corrections are cut like the inputs."""
    recipe = {"method": {"method": "ffsplit", "bits": 5.0, "group": 16}, "drift": 0.5}
    made = ffsplit.compress(tiny(family), recipe=recipe, calibration=family_batches(family, rows=rows), device="cpu")
    assert all(layer["output_error"] < 0.5 for layer in made.report["layers"])


def test_the_probe_leaves_the_ffn_alone() -> None:
    model = tiny("llama")
    block = find_ffns(model).blocks[0]
    before = read(model, block.sites[0]).down.clone()

    def fail(_module: nn.Module, _args: object, _output: Tensor) -> None:
        raise ZeroDivisionError

    handle = model.model.layers[0].mlp.act_fn.register_forward_hook(fail)
    with torch.no_grad(), TensorCache() as cache, pytest.raises(ZeroDivisionError):
        adds_its_output(BlockReplay(model, family_batches("llama"), cache, CPU), block)
    handle.remove()
    assert torch.equal(read(model, block.sites[0]).down, before)
    assert not any(module._forward_hooks for module in model.modules())
