"""Benches in a comparison: which file is whose, and the charts of speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ffsplit.bench.result import BENCH_FILE
from ffsplit.errors import DataError
from ffsplit.report.benches import read_benches
from ffsplit.report.facts import read_facts
from ffsplit.report.page import render_page
from ffsplit.report.speed_charts import latency_chart, speed_chart
from tests.unit.cli_fixtures import SMALL, Call
from tests.unit.test_bad_input import check_refused, copied
from tests.unit.test_report_page import document, row


def bench_of(model: object, **changes: Any) -> dict[str, Any]:
    speeds = {"1": 0.5, "16": 2.0, "2048": 1.25}
    made = {
        "format": "ffsplit-bench",
        "version": 1,
        "model": str(model),
        "ffn_speeds": speeds,
        "verdicts": ["slow: why"],
    }
    return made | changes


def rows() -> list[dict[str, Any]]:
    times = {"prefill_seconds": 2.0, "prefill_speed": 1.0}
    dense = row("dense", 4e8, 10.0, decode_seconds=0.02, decode_speed=1.0, **times)
    return [dense, row("fast", 2e8, 12.0, decode_seconds=0.9, decode_speed=2.0, **times)]


def test_speed_is_drawn_against_tokens_and_the_dense_line_is_one() -> None:
    chart = speed_chart({"a": bench_of("a"), "dense": bench_of("b", ffn_speeds={})}, 1000, 300)
    assert chart is not None
    (line,) = chart.lines
    assert line.name == "a"
    assert [tick.label for tick in chart.x_ticks] == ["1", "16", "2,048"]
    heights = [mark.y for mark in chart.marks]
    one = float(chart.front.split()[0].split(",")[1])
    assert heights[1] < heights[2] < one < heights[0]


def test_no_speed_chart_without_a_compressed_model() -> None:
    assert speed_chart({}, 400, 300) is None
    assert speed_chart({"dense": bench_of("b", ffn_speeds={})}, 400, 300) is None


def test_latency_is_the_references_over_the_speed() -> None:
    chart = latency_chart(rows(), 1000, 300)
    assert chart is not None
    assert [mark.title for mark in chart.marks] == [
        "dense: 20.0 ms, perplexity 10",
        "fast: 10.0 ms, perplexity 12",
    ]
    assert chart.x_label == "Time of a decoded token, ms"
    assert all(mark.emphasis for mark in chart.marks)


def test_latency_of_models_that_do_not_decode_is_of_a_forward() -> None:
    changed = [{**its, "decode_seconds": None, "decode_speed": None} for its in rows()]
    chart = latency_chart(changed, 1000, 300)
    assert chart is not None
    assert chart.x_label == "Time of a forward over a window, ms"
    assert latency_chart([{**its, "prefill_speed": None} for its in changed], 400, 300) is None


def test_the_page_draws_benches_and_lists_their_sentences() -> None:
    page = render_page(document(rows(), benches={"fast": bench_of("fast", verdicts=["<b>slow</b>"])}))
    assert "Speed of the FFNs by number of tokens" in page
    assert "&lt;b&gt;slow&lt;/b&gt;" in page
    assert "Quality against latency" in page
    assert "Speed of the FFNs" not in render_page(document(rows()))


def test_a_bench_lies_in_the_folder_or_is_given(llama: Path, compressed: Path, tmp_path: Path) -> None:
    here = copied(compressed, tmp_path)
    facts = read_facts([str(llama), str(here)])
    assert read_benches(facts) == {}
    (here / BENCH_FILE).write_text(json.dumps(bench_of("wherever it was written")))
    assert list(read_benches(facts)) == [facts[1].name]
    given = tmp_path / "given.json"
    given.write_text(json.dumps(bench_of(here, verdicts=["given"])))
    assert read_benches(facts, [given])[facts[1].name]["verdicts"] == ["given"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "is not what `ffsplit bench` writes"),
        (json.dumps(bench_of("x", version=2)), "has version 2"),
        (json.dumps(bench_of("x", version=None)), "has version None"),
        (json.dumps(bench_of("/elsewhere")), "/elsewhere, which is none of"),
    ],
)
def test_files_that_are_no_bench_of_theirs_are_refused(llama: Path, tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "bench.json"
    file.write_text(content)
    with pytest.raises(DataError, match=words):
        read_benches(read_facts([str(llama)]), [file])


def test_compare_takes_benches(cli: Call, llama: Path, compressed: Path, tmp_path: Path) -> None:
    file, page = tmp_path / "bench.json", tmp_path / "page.html"
    file.write_text(json.dumps(bench_of(compressed)))
    options = (*SMALL, "--device", "cpu", "--out", page, "--bench", file)
    told = cli("compare", llama, compressed, *options)
    assert told.code == 0, told.err
    assert "slow: why" in page.read_text()
    check_refused(cli("compare", llama, *options), "which is none of")
