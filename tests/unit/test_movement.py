"""Masks learned while training: their gradient, their schedule, and what is left when the masked neurons are gone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ffsplit
from ffsplit.calibrate.tokens import TokenWindows
from ffsplit.errors import BudgetError, ModelError, RecipeError, ResumeError
from ffsplit.ffn.sum import SumFFN
from ffsplit.recover.config import Recovery
from ffsplit.recover.run import recover_model
from ffsplit.recover.weights import as_sums, sums_of
from ffsplit.train.masked import MaskedDown, keep_neurons, mask_neurons, remove_masked, unmask
from ffsplit.train.movement import Movement, budgets_for, learned_masks
from tests.tiny import strong, tiny

CPU = torch.device("cpu")
IDS = torch.randint(5, 100, (24, 16), generator=torch.Generator().manual_seed(0))
WINDOWS = TokenWindows.from_ids(IDS)


def settings(**fields: Any) -> Recovery:
    values = {"stages": "masks", "keep": 0.5, "steps": 12, "batch_size": 4, "lr": 3e-3, "seq_len": 16, "evaluations": 4}
    return Recovery(**{**values, **fields})


def sums(name: str = "llama-biased") -> dict[str, SumFFN]:
    return as_sums(tiny(name))


def rows(count: int = 7, width: int = 32, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3), dtype=dtype)


def draw(masks: dict[str, MaskedDown], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for mask in masks.values():
        with torch.no_grad():
            mask.score.normal_(generator=generator)


@pytest.mark.parametrize("name", ["llama-biased", "gpt2", "phi3"])
def test_scores_get_the_gradient_of_the_loss_with_respect_to_a_soft_mask(name: str) -> None:
    module = next(iter(sums(name).values())).double().requires_grad_(True)
    masked = mask_neurons(module)
    masked.score.data = masked.score.data.double()
    masked.mask[::3] = 0
    masked.mask = masked.mask.double()
    x = rows()

    def loss() -> Tensor:
        return module(x).square().sum()

    loss().backward()  # type: ignore[no-untyped-call]
    assert masked.score.grad is not None
    found, hard = masked.score.grad.clone(), masked.mask.clone()
    step = 1e-5
    for neuron in (0, 1, 3, 40, 79):  # masked ones too: they may come back
        values = []
        for sign in (1, -1):
            masked.mask = hard.clone()
            masked.mask[neuron] += sign * step
            values.append(loss().item())
        assert float(found[neuron]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-7)
    assert not masked.down.weight.grad[:, ::3].any()  # type: ignore[index]
    assert masked.down.weight.grad[:, 1::3].any()  # type: ignore[index]


@pytest.mark.parametrize("name", ["llama", "llama-biased", "gpt2", "bert-mlm", "phi3", "apertus", "t5", "xlm"])
def test_the_removed_model_is_the_masked_one(name: str) -> None:
    model = tiny(name)
    found = as_sums(model)
    model.double()
    inputs = {"input_ids": IDS[:2]} | ({"decoder_input_ids": IDS[:2]} if model.config.is_encoder_decoder else {})

    def answer() -> Tensor:
        out: Tensor = model(**inputs)[0]
        return out

    whole = answer()
    with learned_masks(found, Movement(0.5), 10) as masks:
        draw({path: module.branches[0].down for path, module in found.items()})  # type: ignore[misc, union-attr]
        for step in range(10):
            masks.before(step)
        with torch.no_grad():
            wanted = answer()
        widths = masks.widths()
    assert {path: module.spec.neurons for path, module in found.items()} == widths
    assert all(module.spec.is_one_dense_branch for module in found.values())
    assert not any(isinstance(module, MaskedDown) for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(answer(), wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(whole, wanted)


def test_what_is_left_are_the_weights_of_the_neurons_that_stay_to_the_bit() -> None:
    module = next(iter(sums().values()))
    before = module.to_weights()
    masked = mask_neurons(module)
    masked.mask[torch.tensor([0, 7, 41])] = 0
    kept = masked.mask.nonzero().squeeze(1)
    remove_masked(module)
    wanted = before.take(kept)
    for one, other in zip(module.to_weights().tensors().values(), wanted.tensors().values(), strict=True):
        assert torch.equal(one, other)


def test_the_schedule_is_cubic_and_ends_at_the_budget() -> None:
    found = sums()
    dense = sum(module.spec.parameters for module in found.values())
    neurons = sum(module.spec.neurons for module in found.values())
    with learned_masks(found, Movement(0.4, begin=0.2, end=0.8), 50) as masks:
        draw({name: module.branches[0].down for name, module in found.items()})  # type: ignore[misc, union-attr]
        left = []
        for step in range(50):
            masks.before(step)
            left.append(sum(masks.widths().values()))
            assert masks.settled(step + 1) == (step >= 40)
        assert not any(module.branches[0].down.learning for module in found.values())  # type: ignore[union-attr]
    assert left[:10] == [neurons] * 10
    assert left[40:] == [left[-1]] * 10
    assert left == sorted(left, reverse=True)
    for step in range(10, 41):
        share = 1 - (step - 9) / 31
        assert left[step] == pytest.approx(left[-1] + (neurons - left[-1]) * share**3, abs=1)
    now = sum(module.spec.parameters for module in found.values())
    assert 0.4 * dense - max(m.spec.parameters / m.spec.neurons for m in found.values()) < now <= 0.4 * dense


def test_neurons_compete_in_the_whole_model_or_in_each_ffn() -> None:
    for scope, even in (("model", False), ("ffn", True)):
        found = sums()
        first, *_ = found
        with learned_masks(found, Movement(0.5, scope), 10) as masks:  # type: ignore[arg-type]
            with torch.no_grad():
                found[first].branches[0].down.score.fill_(-1)  # type: ignore[union-attr]
            for step in range(10):
                masks.before(step)
            widths = list(masks.widths().values())
        assert (len(set(widths)) == 1) == even
    found = sums()
    with learned_masks(found, Movement(0.1), 10) as masks:  # the best neuron of an FFN stays, come what may
        found[first].branches[0].down.score.data.fill_(-1)  # type: ignore[union-attr]
        for step in range(10):
            masks.before(step)
    assert min(module.spec.neurons for module in found.values()) == 1


def test_an_error_leaves_the_model_as_it_was() -> None:
    found = sums()
    before = {name: module.to_weights().tensors() for name, module in found.items()}
    with pytest.raises(ZeroDivisionError), learned_masks(found, Movement(0.5), 10) as masks:
        masks.before(1 // 0)
    for name, module in found.items():
        assert all(torch.equal(module.to_weights().tensors()[key], value) for key, value in before[name].items())


def test_what_cannot_be_masked_is_refused() -> None:
    svd = ffsplit.compress(tiny("llama"), recipe={"method": {"method": "svd", "keep": 0.5}}, calibration=IDS).model
    before = {name: tensor.clone() for name, tensor in svd.state_dict().items()}
    with pytest.raises(ModelError, match="dense or pruned FFNs alone"):
        recover_model(svd, tiny("llama"), WINDOWS, settings(), device=CPU)
    assert all(torch.equal(before[name], tensor) for name, tensor in svd.state_dict().items())
    specs = {name: module.spec for name, module in sums().items()}
    with pytest.raises(BudgetError, match="smallest reachable keep"):
        budgets_for(specs, Movement(0.001))
    with pytest.raises(BudgetError, match="more than the FFNs have left"):
        budgets_for(specs, Movement(0.9), dense=10 * sum(spec.parameters for spec in specs.values()))
    with pytest.raises(RecipeError, match="too few"):
        recover_model(tiny("llama"), tiny("llama"), WINDOWS, settings(steps=2), device=CPU)
    for values in ({"keep": 0.0}, {"keep": 0.5, "begin": 0.7}, {"keep": 0.5, "scope": "wibble"}):
        with pytest.raises(RecipeError, match="masks"):
            Movement(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "bert-mlm", "bert-classifier"])
def test_the_loss_of_the_narrower_model_falls(name: str) -> None:
    dense, student = strong(name), strong(name)
    random = strong(name)
    for module in as_sums(random).values():
        keep_neurons(module, torch.arange(module.spec.neurons // 2))
    config = settings(steps=60)
    notes = recover_model(student, dense, WINDOWS, config, device=CPU)["stages"][0]
    untrained = recover_model(random, dense, WINDOWS, settings(stages="model", keep=None, steps=1, lr=1e-9), device=CPU)
    assert notes["stage"] == "masks"
    assert notes["held_out_loss_before"] == pytest.approx(0, abs=1e-6)
    assert 0 < notes["held_out_loss"] < untrained["stages"][0]["held_out_loss_before"]
    assert notes["best_step"] > 42
    widths = {path: module.spec.neurons for path, module in sums_of(student).items()}
    assert widths == notes["widths"]
    assert not any(parameter.requires_grad for parameter in student.parameters())


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("at", [4, 10])
def test_a_killed_run_ends_at_the_very_masks_and_weights(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = strong("llama")
    config = settings(stages="masks,model", steps=14)
    whole = strong("llama")
    notes = recover_model(whole, dense, WINDOWS, config, device=CPU)

    def die(_label: str, done: int, _total: int) -> None:
        if done == at:
            raise _KilledError

    monkeypatch.setattr("ffsplit.recover.whole.SAVE_SECONDS", 0.0)
    with pytest.raises(_KilledError):
        recover_model(strong("llama"), dense, WINDOWS, config, device=CPU, folder=tmp_path, progress=die)
    steps: list[int] = []
    resumed = strong("llama")
    recover_model(
        resumed, dense, WINDOWS, config, device=CPU, folder=tmp_path, progress=lambda _l, done, _t: steps.append(done)
    )
    assert steps[0] >= at
    assert_same(resumed, whole)
    finished = strong("llama")
    again = recover_model(finished, dense, WINDOWS, config, device=CPU, folder=tmp_path, progress=die)
    assert_same(finished, whole)
    assert [stage["held_out_loss"] for stage in again["stages"]] == [s["held_out_loss"] for s in notes["stages"]]
    with pytest.raises(ResumeError, match="other recovery"):
        recover_model(strong("llama"), dense, WINDOWS, settings(seed=3), device=CPU, folder=tmp_path)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in other.state_dict().items())


def test_half_precision_comes_back() -> None:
    dense, student = tiny("llama").to(torch.bfloat16), tiny("llama").to(torch.bfloat16)
    recover_model(student, dense, WINDOWS, settings(precision="bfloat16"), device=CPU)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}


def test_masks_can_be_taken_away_again() -> None:
    module = next(iter(sums().values()))
    x, before = rows(dtype=torch.float32), copy.deepcopy(module)
    masked = mask_neurons(module)
    assert torch.equal(module(x), before(x))
    masked.mask[:5] = 0
    assert not torch.equal(module(x), before(x))
    assert torch.equal(masked.dense()[:, :5], torch.zeros(32, 5))
    unmask(module)
    assert torch.equal(module(x), before(x))
