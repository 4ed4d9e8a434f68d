"""The objective: what it compares, where, and that a measurement leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffsplit.budget import damage as damage_module
from ffsplit.budget.damage import measure
from ffsplit.budget.objective import Objective
from ffsplit.budget.scene import Scene
from ffsplit.calibrate.batches import make_batches
from ffsplit.errors import ModelError, RecipeError
from ffsplit.families import find_ffns
from ffsplit.methods.registry import method_config
from ffsplit.ops.divergence import kl_divergence
from ffsplit.pipeline.compress import shapes_of
from tests.tiny import VOCABULARY, tiny

PRUNED = method_config({"method": "prune", "keep": 0.5})
HALF = method_config({"method": "prune", "keep": 0.25})


def batches(rows: int = 4, columns: int = 24, *, padded: bool = False) -> list[dict[str, Tensor]]:
    ids = torch.randint(5, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(2))
    if not padded:
        return [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}]
    mask = (torch.arange(columns) < torch.tensor([[columns], [columns // 3]])).long()
    return [{"input_ids": ids[:2], "attention_mask": mask}]


def scene(model: PreTrainedModel, data: list[dict[str, Tensor]], store: Path | None = None) -> Scene:
    found = find_ffns(model)
    given = make_batches(model, None, data, seq_len=24, samples=4, batch_size=2)
    return Scene(model, found, shapes_of(model, found), given, torch.device("cpu"), store=store)


def louder(model: PreTrainedModel) -> None:
    """Change what the first FFN gives."""
    for name, parameter in model.named_parameters():
        if "0" in name and ("down_proj" in name or "output.dense" in name):
            parameter.data.mul_(3)


@pytest.mark.parametrize("family", ["llama", "bert-mlm", "bert", "t5", "vit", "gpt2"])
def test_the_dense_model_does_no_damage(family: str) -> None:
    from tests.unit.family_batches import family_batches

    here = scene(tiny(family), family_batches(family))
    objective = Objective.of(here, 2)
    for metric in ("kl", "js", "angular", "norm"):
        assert objective.now(metric) == pytest.approx(0.0, abs=2e-4)  # type: ignore[arg-type]


def test_damage_is_the_divergence_of_the_logits() -> None:
    model = tiny("llama")
    here = scene(model, batches())
    objective = Objective.of(here, 2)
    with torch.no_grad():
        before = [model(**batch).logits for batch in batches()]
        louder(model)
        after = [model(**batch).logits for batch in batches()]
    expected = [
        float(kl_divergence(b.flatten(0, 1), a.flatten(0, 1)).mean()) for b, a in zip(before, after, strict=True)
    ]
    assert objective.now() == pytest.approx(sum(expected) / 2, rel=1e-3)
    assert objective.now() > 1e-7


def test_padding_is_not_compared() -> None:
    model, data = tiny("bert-mlm"), batches(padded=True)
    objective = Objective.of(scene(model, data), 1)
    with torch.no_grad():
        before = model(**data[0]).logits
        louder(model)
        after = model(**data[0]).logits
    real = data[0]["attention_mask"].bool()
    expected = float(kl_divergence(before[real], after[real]).mean())
    assert objective.now() == pytest.approx(expected, rel=1e-3)


def test_fewer_batches_than_asked_are_all_there_are() -> None:
    assert Objective.of(scene(tiny("llama"), batches()), 50).batches == 2


def test_nan_answers_are_infinite_damage() -> None:
    model = tiny("llama")
    objective = Objective.of(scene(model, batches()), 1)
    next(model.parameters()).data.fill_(float("nan"))
    assert objective.now() == float("inf")


def test_a_dense_model_that_answers_nan_is_refused() -> None:
    model = tiny("llama")
    here = scene(model, batches())
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ModelError, match="own answers are NaN"):
        Objective.of(here, 1)


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(RecipeError, match="metric='cosine'"):
        Objective.of(scene(tiny("llama"), batches()), 1).now("cosine")  # type: ignore[arg-type]


def test_measuring_puts_everything_back() -> None:
    model = tiny("llama")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    here = scene(model, batches())
    found = measure(here, [[PRUNED, HALF], [HALF]], Objective.of(here, 2))
    assert [len(row) for row in found] == [2, 1]
    assert all(value > 0 for row in found for value in row)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_damage_is_that_of_one_ffn_replaced_alone() -> None:
    import ffsplit

    model = tiny("llama")
    here = scene(model, batches())
    objective = Objective.of(here, 2)
    ((alone,), _) = measure(here, [[PRUNED], [PRUNED]], objective)
    recipe = {"method": {"method": "prune", "keep": 0.5}, "overrides": [{"ffns": "1", "method": None}]}
    ffsplit.compress(model, recipe=recipe, calibration=batches(), device="cpu")
    assert objective.now() == pytest.approx(alone, rel=1e-3, abs=1e-9)


def test_what_is_known_is_not_fitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = scene(tiny("llama"), batches(), tmp_path)
    objective = Objective.of(here, 2)
    first = measure(here, [[PRUNED], [PRUNED]], objective)
    fitted: list[Any] = []
    original = damage_module._damage
    monkeypatch.setattr(damage_module, "_damage", lambda *args: fitted.append(args[5]) or original(*args))
    again = measure(here, [[HALF, PRUNED], [PRUNED]], objective)
    assert fitted == [HALF]
    assert [again[0][1], again[1][0]] == [first[0][0], first[1][0]]
    assert measure(here, [[PRUNED, PRUNED], [PRUNED]], objective)[0] == [first[0][0]] * 2
    assert fitted == [HALF]
