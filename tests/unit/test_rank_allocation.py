"""Ranks of whole FFNs under one budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ffsplit
from ffsplit.errors import BudgetError, RecipeError
from tests.conformance.test_methods import ids, logits
from tests.tiny import tiny


def run(family: str = "llama", **method: Any) -> ffsplit.CompressionResult:
    model = tiny(family)
    return ffsplit.compress(model, recipe={"method": {"method": "ranks", **method}}, calibration=ids(), device="cpu")


def chosen(result: ffsplit.CompressionResult) -> list[int]:
    return [ffn.spec.branches[0].up.rank for ffn in result.plan.ffns]


@pytest.mark.parametrize("factors", ["whitened", "plain"])
@pytest.mark.parametrize("family", ["llama", "bert-mlm"])
def test_an_ffn_of_low_rank_gets_less(family: str, factors: str) -> None:
    """The first FFN's matrices have rank 3, so no further rank of it saves anything."""
    model = tiny(family)
    sites = ffsplit.find_ffns(model).sites
    for name in filter(None, (sites[0].up, sites[0].gate, sites[0].down)):
        weight = model.get_submodule(name).weight
        u, s, v = torch.linalg.svd(weight.detach(), full_matrices=False)
        with torch.no_grad():
            weight.copy_((u[:, :3] * s[:3]) @ v[:3])
    method = {"method": "ranks", "keep": 0.5, "factors": factors, "floor": 0.25}
    result = ffsplit.compress(model, recipe={"method": method}, calibration=ids(), device="cpu")
    first, *others = chosen(result)
    assert first < min(others)
    assert 0.47 < result.plan.keep <= 0.5
    assert first >= 3
    for ffn, rank in zip(result.plan.ffns, chosen(result), strict=True):
        assert {projection.rank for projection in ffn.spec.projections} == {rank}


def test_a_floor_of_one_is_the_uniform_rank() -> None:
    uniform = ffsplit.compress(tiny("llama"), recipe="whitened-svd", keep=0.5, calibration=ids(), device="cpu")
    result = run(keep=0.5, floor=1)
    assert chosen(result) == chosen(uniform)
    assert torch.equal(logits(result.model), logits(uniform.model))


def test_settings_reach_the_method() -> None:
    for ffn in run(keep=0.5, refit=False, ridge=0.5).plan.ffns:
        assert ffn.method is not None
        assert (ffn.method.method, ffn.method.refit, ffn.method.ridge) == ("whitened-svd", False, 0.5)
    assert {ffn.method and ffn.method.method for ffn in run(keep=0.5, factors="plain").plan.ffns} == {"svd"}


def test_the_smallest_keep_that_an_error_names_works() -> None:
    with pytest.raises(BudgetError, match=r"smallest reachable keep is ([\d.]+)") as refused:
        run(keep=0.01)
    smallest = float(str(refused.value).rsplit(" ", 1)[1])
    assert chosen(run(keep=smallest + 1e-4)) == [1, 1]


def test_a_full_budget_changes_nothing_and_none_is_refused() -> None:
    torch.testing.assert_close(logits(run(keep=1.0).model), logits(tiny("llama")))
    with pytest.raises(RecipeError, match="keep must be above 0"):
        run(keep=0.0)
