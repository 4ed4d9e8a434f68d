"""Charts, cells and the escaping of the page, from made-up numbers."""

from __future__ import annotations

from typing import Any

import pytest

from ffsplit.report.chart import Mark, error_chart, place_labels, quality_chart
from ffsplit.report.columns import COLUMNS, columns_of
from ffsplit.report.page import render_page
from ffsplit.report.rows import loss, mark_front

BOX = (50.0, 10.0, 390.0, 290.0)


def row(name: str, memory: float, perplexity: float | None = None, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {column.key: None for column in COLUMNS}
    values |= {"name": name, "kind": "dense", "method": None, "bytes_memory": memory, "perplexity": perplexity}
    return values | {"prefill_seconds": None, "decode_seconds": None, "on_front": False} | changes


def document(rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    mark_front(rows)
    hardware = {"cpu": "cpu", "cores": 2, "threads": 2, "memory_bytes": 8e9, "accelerator": None}
    data = {"source": "text", "split": "all", "samples": 2, "seq_len": 16, "tokens": 32, "tokens_sha256": "ab",
            "text_sha256": None}  # fmt: skip
    made = {"versions": {"ffsplit": "0.1", "torch": "2"}, "hardware": hardware, "platform": "here",
            "date": "2026-11-22T00:00:00+00:00", "commit": None, "data": data}  # fmt: skip
    return {
        "rows": rows, "layers": {}, "model_kind": "causal", "reference": rows[0]["name"], "reference_is_dense": True,
        "settings": {"device": "cpu", "dtype": "float32", "timing": None}, "provenance": made, "benches": {},
    } | changes  # fmt: skip


def column(key: str) -> Any:
    return next(column for column in COLUMNS if column.key == key)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("perplexity", 17.891, "17.89"),
        ("perplexity", 158784.2, "158,784"),
        ("perplexity", 3.2e9, "3.2e+09"),
        ("perplexity", float("inf"), "∞"),
        ("perplexity", None, "–"),
        ("kl", float("nan"), "–"),
        ("keep_ffn", 0.7504, "75.0"),
        ("bytes_memory", 538_100_000, "538.1"),
        ("decode_speed", 0.987, "0.99"),
    ],
)
def test_cells(key: str, value: float | None, text: str) -> None:
    assert column(key).text({key: value}) == text


def test_only_columns_with_a_number_are_shown() -> None:
    assert [column.key for column in columns_of([row("a", 1.0, 2.0), row("b", 1.0)])] == ["bytes_memory", "perplexity"]


def test_less_loss_is_better_for_every_kind() -> None:
    assert loss(row("a", 1, 10.0)) < loss(row("b", 1, 11.0))
    assert loss(row("a", 1, accuracy=0.9)) < loss(row("b", 1, accuracy=0.8))
    assert loss(row("a", 1, cosine=0.99)) < loss(row("b", 1, cosine=0.9))


def test_better_models_are_lower_for_perplexity_and_higher_otherwise() -> None:
    falling = quality_chart([row("a", 4e8, 10.0), row("b", 2e8, 20.0)], 400, 300)
    rising = quality_chart([row("a", 4e8, accuracy=0.9), row("b", 2e8, accuracy=0.5)], 400, 300)
    assert falling.marks[0].y > falling.marks[1].y
    assert rising.marks[0].y < rising.marks[1].y
    assert falling.marks[0].x > falling.marks[1].x


def test_a_wrecked_model_is_named_and_does_not_flatten_the_others() -> None:
    chart = quality_chart([row("a", 4e8, 10.0), row("b", 2e8, 20.0), row("c", 3e8, 1e5)], 400, 300)
    assert chart.missing == ["c"]
    assert len(chart.marks) == 2


def test_no_chart_without_two_measured_models() -> None:
    assert quality_chart([row("a", 4e8, 10.0), row("b", 2e8, float("inf"))], 400, 300) is None
    assert error_chart({"a": [{"output_error": None}]}, 400, 300) is None


def test_labels_never_cover_each_other_or_leave_the_chart() -> None:
    marks = [Mark(200 + 3 * i, 150 + 2 * i, "", i == 0, f"checkpoint {i}") for i in range(12)]
    placed = place_labels(marks, BOX)
    areas = []
    for mark in (mark for mark in placed if mark.label):
        size = 6.6 * len(mark.label)
        left = mark.label_x - {"start": 0, "middle": size / 2, "end": size}[mark.anchor]
        areas.append((left, mark.label_y - 11, left + size, mark.label_y + 3))
        assert left >= BOX[0]
        assert left + size <= BOX[2] + 8
    assert placed[0].label, "the point on the front chooses first"
    assert 1 < len(areas) < 12
    for index, one in enumerate(areas):
        for other in areas[index + 1 :]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_error_lines_skip_what_was_not_measured() -> None:
    layers = {"a": [{"output_error": 0.1}, {"output_error": None}, {"output_error": 0.3}], "b": [{"output_error": 0.1}]}
    chart = error_chart(layers, 1000, 300)
    assert [line.name for line in chart.lines] == ["a"]
    assert len(chart.lines[0].points.split()) == 2


def test_names_are_escaped() -> None:
    evil = "<script>alert(1)</script>"
    page = render_page(document([row(evil, 4e8, 10.0), row("b", 2e8, 20.0, method='"x" & y')]))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 3
    assert "&#34;x&#34; &amp; y" in page


def test_equal_neighbours_share_a_line() -> None:
    layer = {"method": "prune", "terms": ["8 neurons, dense"], "keep": 0.5, "bits": 8.0, "output_error": 0.1}
    other = {**layer, "method": None, "output_error": None}
    named = [{**its, "ffn": f"h.{index}"} for index, its in enumerate([layer, layer, layer, other])]
    page = render_page(document([row("a", 4e8, 10.0), row("b", 2e8, 20.0)], layers={"a": [], "b": named}))
    assert '<th scope="row">0–2</th>' in page
    assert '<th scope="row">3</th>' in page
    assert "untouched" in page
