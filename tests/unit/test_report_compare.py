"""Comparing real (tiny) checkpoints: rows, structure, the page, and what is refused."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

import ffsplit
from ffsplit.errors import CheckpointError, DataError, ModelError
from ffsplit.report.compare import Comparison, compare_checkpoints
from ffsplit.report.facts import short_names
from ffsplit.report.tables import comparison_table, layer_table
from tests.tiny import tiny

IDS = torch.randint(3, 128, (3, 24), generator=torch.Generator().manual_seed(0))
NUMBERS = ("keep_ffn", "keep_model", "bits_ffn", "bytes_disk", "bytes_memory", "perplexity")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A dense model, a plain pruned one and one that needs ffsplit."""
    root = tmp_path_factory.mktemp("checkpoints")
    tiny("llama").save_pretrained(root / "dense")
    for name, recipe, budget in (("pruned", "prune", {"keep": 0.5}), ("low-bit", "quantize", {"bits": 5.0})):
        result = ffsplit.compress(str(root / "dense"), recipe=recipe, calibration=IDS, device="cpu", **budget)
        ffsplit.save(result, root / name)
    return {name: str(root / name) for name in ("dense", "pruned", "low-bit")}


@pytest.fixture(scope="module")
def comparison(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    out = tmp_path_factory.mktemp("page")
    return compare_checkpoints(list(folders.values()), data=IDS, device="cpu", out=out)


def test_a_row_per_checkpoint_in_the_given_order(comparison: Comparison) -> None:
    assert [(row["name"], row["kind"], row["method"]) for row in comparison.rows] == [
        ("dense", "dense", None),
        ("pruned", "stock", "prune"),
        ("low-bit", "ffsplit", "quantize"),
    ]
    assert all(isinstance(row[key], int | float) for row in comparison.rows for key in NUMBERS)


def test_budgets_are_those_of_the_checkpoints(comparison: Comparison) -> None:
    dense, pruned, low_bit = comparison.rows
    assert (dense["keep_ffn"], dense["keep_model"], dense["bits_ffn"]) == (1.0, 1.0, 16.0)
    assert pruned["keep_ffn"] == 0.5
    assert pruned["keep_model"] < 1
    assert low_bit["bits_ffn"] <= 5.0
    assert low_bit["bytes_memory"] < pruned["bytes_memory"] < dense["bytes_memory"]


def test_the_reference_has_no_distance_to_itself_and_speed_one(comparison: Comparison) -> None:
    dense, *others = comparison.rows
    assert dense["kl"] is None
    assert dense["top1"] is None
    assert dense["prefill_speed"] == dense["decode_speed"] == 1.0
    assert all(row["kl"] > 0 and 0 < row["top1"] <= 1 for row in others)
    assert all(row["prefill_speed"] > 0 and row["decode_speed"] > 0 for row in others)


def test_the_front_holds_the_smallest_and_the_best(comparison: Comparison) -> None:
    smallest = min(comparison.rows, key=lambda row: row["bytes_memory"])
    best = min(comparison.rows, key=lambda row: row["perplexity"])
    assert smallest["on_front"]
    assert best["on_front"]


def test_layers_say_what_became_of_them(comparison: Comparison) -> None:
    dense, pruned, low_bit = comparison.checkpoints
    assert dense.layers == ()
    assert [layer.ffn for layer in pruned.layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert pruned.layers[0].terms == ("40 neurons, dense",)
    assert pruned.layers[0].keep == 0.5
    assert pruned.layers[0].output_error > 0
    assert "int4" in low_bit.layers[0].terms[0]


def test_json_holds_everything_and_no_infinity(comparison: Comparison) -> None:
    comparison.rows[1]["perplexity"], kept = float("inf"), comparison.rows[1]["perplexity"]
    try:
        document = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    finally:
        comparison.rows[1]["perplexity"] = kept
    assert document["rows"][1]["perplexity"] is None
    assert document["provenance"]["data"]["tokens"] == IDS.numel()
    assert document["reference"] == "dense"
    assert document["reference_is_dense"] is True
    assert document["settings"]["timing"]["seq_len"] == IDS.shape[1]


def test_the_page_stands_alone(comparison: Comparison) -> None:
    assert comparison.page is not None
    assert comparison.page.name == "compare.html"
    page = Page(comparison.page.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert not page.links
    assert page.unclosed == []
    assert page.attributes("html")["lang"] == "en"
    assert all("aria-label" in attributes for attributes in page.all_attributes("svg") if "role" in attributes)
    assert {"table", "thead", "figure", "figcaption", "main", "h1"} <= set(page.tags)
    for wanted in ("dense", "pruned", "low-bit", "40 neurons, dense", comparison.provenance["data"]["tokens_sha256"]):
        assert wanted in page.text


def test_terminal_tables_show_the_same(comparison: Comparison) -> None:
    console = Console(file=StringIO(), width=200)
    console.print(comparison_table(comparison.rows))
    console.print(layer_table(comparison.to_dict()["layers"]["pruned"]))
    shown = console.file.getvalue()
    for wanted in ("dense", "pruned", "low-bit *", "Perplexity", "nats/token", "40 neurons, dense"):
        assert wanted in shown
    assert f"{comparison.rows[1]['perplexity']:.2f}" in shown


def test_without_speed_nothing_is_timed(folders: dict[str, str]) -> None:
    result = compare_checkpoints([folders["dense"], folders["pruned"]], data=IDS, device="cpu", speed=False)
    assert result.page is None
    assert result.settings["timing"] is None
    assert all(row["prefill_speed"] is None and row["decode_seconds"] is None for row in result.rows)


def test_a_compressed_reference_is_said_to_be_one(folders: dict[str, str], tmp_path: Path) -> None:
    page = tmp_path / "report" / "mine.html"
    result = compare_checkpoints([folders["pruned"], folders["low-bit"]], data=IDS, device="cpu", speed=False, out=page)
    assert result.page == page
    assert result.reference_is_dense is False
    assert "The reference is not a dense model" in page.read_text(encoding="utf-8")


def test_one_checkpoint_alone(folders: dict[str, str]) -> None:
    result = compare_checkpoints([folders["dense"]], data=IDS, device="cpu", speed=False)
    assert len(result.rows) == 1
    assert result.rows[0]["perplexity"] > 1
    assert result.rows[0]["on_front"]


def test_encoders_are_compared_by_their_states(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "dense")
    compressed = ffsplit.compress(str(tmp_path / "dense"), recipe="prune", keep=0.5, calibration=IDS, device="cpu")
    ffsplit.save(compressed, tmp_path / "pruned")
    places = [str(tmp_path / "dense"), str(tmp_path / "pruned")]
    result = compare_checkpoints(places, data=IDS, device="cpu", out=tmp_path)
    assert result.model_kind == "encoder"
    assert result.rows[0]["cosine"] == 1.0
    assert 0 < result.rows[1]["cosine"] < 1
    assert result.rows[1]["perplexity"] is None
    assert result.rows[1]["decode_speed"] is None
    assert "Cosine to the reference" in result.page.read_text(encoding="utf-8")


def test_progress_names_the_checkpoint(folders: dict[str, str]) -> None:
    seen: list[tuple[str, int, int]] = []
    compare_checkpoints(
        [folders["dense"], folders["pruned"]], data=IDS, device="cpu", speed=False,
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    assert seen[-1] == ("pruned: comparison", 3, 3)


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(DataError, match="give at least one checkpoint"):
        compare_checkpoints([])


def test_a_missing_folder_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no config"):
        compare_checkpoints([folders["dense"], str(tmp_path / "empty")], data=IDS, device="cpu")


def test_models_of_other_vocabularies_are_refused_by_name(folders: dict[str, str], tmp_path: Path) -> None:
    other = tiny("llama")
    other.resize_token_embeddings(200)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="other against dense: cannot compare models with 128 and 200 logits"):
        compare_checkpoints([folders["dense"], str(tmp_path / "other")], data=IDS, device="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ("[]", "holds a list"), ('{"ffns": [{"site": {}}]}', "damaged, or written by another version")],
)
def test_a_damaged_plan_is_refused(folders: dict[str, str], tmp_path: Path, content: str, message: str) -> None:
    for file in Path(folders["pruned"]).iterdir():
        (tmp_path / file.name).symlink_to(file)
    plan = tmp_path / "ffsplit_plan.json"
    plan.unlink()
    plan.write_text(content)
    with pytest.raises(CheckpointError, match=message):
        compare_checkpoints([folders["dense"], str(tmp_path)], data=IDS, device="cpu")


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["/a/x", "/b/y"], ["x", "y"]),
        (["/runs/a/out", "/runs/b/out", "/runs/c"], ["a/out", "b/out", "c"]),
        (["owner/model", "/m/model"], ["owner/model", "model"]),
        (["/m/x", "/m/x"], ["/m/x (1)", "/m/x (2)"]),
        (["/models/x.gguf"], ["x.gguf"]),
    ],
)
def test_short_names_tell_checkpoints_apart(places: list[str], names: list[str]) -> None:
    assert short_names(places) == names


class Page(HTMLParser):
    """What the tests want to know of an HTML page."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: dict[str, list[dict[str, str | None]]] = {}
        self.links: list[str | None] = []
        self.unclosed: list[str] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.setdefault(tag, []).append(dict(attrs))
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag not in self.VOID:
            self.unclosed.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.unclosed.remove(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.unclosed and self.unclosed.pop() != tag:
            raise AssertionError(f"</{tag}> closes another element")

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, tag: str) -> dict[str, str | None]:
        return self.tags[tag][0]

    def all_attributes(self, tag: str) -> list[dict[str, str | None]]:
        return self.tags[tag]
