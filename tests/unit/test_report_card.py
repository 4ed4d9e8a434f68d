"""The model card: a valid header, true sentences, and no private paths."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from ffsplit.checkpoint.card import model_card
from ffsplit.ffn.projections import DenseSpec, LowRankSpec, PackedSpec
from ffsplit.ffn.spec import BranchSpec, SumSpec
from ffsplit.pipeline.plan import Plan, PlannedFFN

DENSE = BranchSpec(up=DenseSpec(shape=(16, 8)), down=DenseSpec(shape=(8, 16)))
HALF = BranchSpec(up=DenseSpec(shape=(8, 8)), down=DenseSpec(shape=(8, 8)))
RECIPE = "method:\n  method: prune\n"
REPORT: dict[str, Any] = {
    "coverage": {"covered_share_of_ffn": 1.0},
    "budget": {"keep_ffn": 0.75, "keep_linear": 0.8, "keep_model": 0.9, "bits_ffn": 12.0},
    "calibration": {"source": "valid.txt", "sha256": "ab12", "samples": 48, "tokens": 98304},
    "layers": [{"ffn": "h.0.mlp", "output_error": 0.25}, {"ffn": "h.1.mlp", "output_error": float("nan")}],
    "provenance": {"versions": {"ffsplit": "0.1", "torch": None}, "date": "2026-11-22T05:00:00+00:00", "seed": 3},
}


def planned(branch: BranchSpec, name: str) -> PlannedFFN:
    return PlannedFFN(
        site={"name": name},
        shape={"d_model": 8, "d_ff": 16, "gated": False},
        method=None,
        spec=SumSpec(d_model=8, branches=(branch,)),
    )


PLAN = Plan(ffns=(planned(DENSE, "h.0.mlp"), planned(HALF, "h.1.mlp"), planned(HALF, "h.2.mlp")))


def card(report: dict[str, Any] = REPORT, base: str = "owner/model", stock: bool = False) -> str:
    return model_card(report, PLAN, RECIPE, base, stock)


def header(text: str) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return fields


def test_the_header_is_the_hubs() -> None:
    assert header(card()) == {"library_name": "transformers", "base_model": "owner/model", "tags": ["ffsplit"]}


@pytest.mark.parametrize("base", ["", "/home/someone/secret/model", "tests/unit"])
def test_a_base_that_is_no_hub_id_stays_out_of_the_header(base: str) -> None:
    text = card(base=base)
    assert "base_model" not in header(text)
    assert "secret" not in text


def test_budget_data_and_limits_are_said() -> None:
    text = card()
    for budget in ("75.0 %", "80.0 %", "90.0 %", "12.00"):
        assert f" {budget} |" in text
    for wanted in ("`valid.txt`", "98,304 tokens", "`ab12`", "0.250", "`h.0.mlp`", RECIPE.strip()):
        assert wanted in text
    assert text.endswith("Made 2026-11-22; ffsplit 0.1; seed 3.\n")
    assert "nan" not in text
    assert "None" not in text


def test_structures_are_counted() -> None:
    text = card()
    assert "* 2 FFNs, untouched: 8 neurons, dense." in text
    assert "* 1 FFN, untouched: 16 neurons, dense." in text


def test_loading_needs_the_import_exactly_if_it_is_not_stock() -> None:
    assert "import ffsplit" in card(stock=False)
    assert "raises an error" in card(stock=False)
    assert "import ffsplit" not in card(stock=True)
    assert "Nothing but transformers is needed" in card(stock=True)


def test_partial_coverage_is_a_limit() -> None:
    text = card({**REPORT, "coverage": {"covered_share_of_ffn": 0.5}})
    assert "Only 50.0 % of the model's FFN parameters" in text


def test_an_empty_report_still_makes_a_card() -> None:
    text = card({})
    assert "No text was used." in text
    assert f"{100 * PLAN.keep:.1f} %" in text


def test_branches_in_words() -> None:
    packed = PackedSpec(shape=(16, 8), bits=3, group=8)
    mixed = BranchSpec(up=packed, gate=packed, down=LowRankSpec(shape=(8, 16), rank=4))
    assert mixed.describe() == "16 neurons, up int3 in groups of 8, gate int3 in groups of 8, down rank 4"
    assert SumSpec(d_model=8).describe() == "dropped"
    linear = SumSpec(d_model=8, branches=(DENSE,), linear=LowRankSpec(shape=(8, 8), rank=2))
    assert linear.describe() == "16 neurons, dense + linear map, rank 2"
