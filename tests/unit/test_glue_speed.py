"""``benchmarks/glue_speed.py`` and its table: what is timed, and that nothing that was asked for gets lost."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from ffsplit.errors import ModelError
from ffsplit.families.surgery import restore
from ffsplit.ffn.projections import LowRankSpec
from ffsplit.ffn.shape import FFNShape
from tests.tiny import tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
IDS = (5 + torch.arange(24) % 50).view(2, 12)
MPNET = FFNShape(768, 3072, gated=False, up_bias=True, down_bias=True)
MINILM = FFNShape(384, 1536, gated=False, up_bias=True, down_bias=True)
Script = Callable[[str], ModuleType]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """A script of the benchmarks, which are no package and import each other by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize(("shape", "keep"), [(MPNET, 0.353), (MPNET, 0.3), (MINILM, 0.569), (MINILM, 0.3)])
@pytest.mark.parametrize("way", ["svd", "ffsplit", "prune", "ffsplit-linear"])
def test_every_variant_is_aligned_and_within_its_budget(script: Script, shape: FFNShape, keep: float, way: str) -> None:
    spec = script("_glue_variants").planned(shape, way, keep, 64)
    sizes = [branch.neurons for branch in spec.branches]
    sizes += [projection.rank for projection in spec.projections if isinstance(projection, LowRankSpec)]
    assert [size for size in sizes if size % 64] == []
    assert 0.65 * keep < spec.parameters / shape.parameters <= keep


def test_variants_are_exchanged_and_the_dense_model_stays(script: Script) -> None:
    model = tiny("mpnet")
    with torch.inference_mode():
        expected = model(input_ids=IDS).last_hidden_state
        variants = script("_glue_variants").variants_of(model, "minilm", ["43.1", "70"], 4)
        assert torch.equal(model(input_ids=IDS).last_hidden_state, expected)
        assert [variant.name for variant in variants] == [
            "dense",
            *(f"{way} {budget}" for budget in ("43.1", "70") for way in ("svd", "ffsplit", "prune", "ffsplit-linear")),
            "none",
        ]
        for variant in variants[1:]:
            restore(model, variant.modules)
            out = model(input_ids=IDS).last_hidden_state
            assert out.isfinite().all()
            assert not torch.equal(out, expected), variant.name
            assert variant.keep <= (0.3 if "70" in variant.name else 0.569)
        restore(model, variants[0].modules)
        assert torch.equal(model(input_ids=IDS).last_hidden_state, expected)


def test_position_bias_is_made_once_a_size_and_is_the_same(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mpnet")
    made: list[tuple[int, ...]] = []
    compute = type(model.encoder).compute_position_bias

    def counted(self: nn.Module, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        made.append(tuple(x.shape[:2]))
        return compute(self, x, *rest)  # type: ignore[no-any-return]

    monkeypatch.setattr(type(model.encoder), "compute_position_bias", counted)
    batches = (IDS, IDS[:1], IDS, IDS[:1])
    with torch.inference_mode():
        expected = [model(input_ids=ids).last_hidden_state for ids in batches]
        made.clear()
        script("_glue_variants").reuse_position_bias(model)
        found = [model(input_ids=ids).last_hidden_state for ids in batches]
    assert made == [(2, 12), (1, 12)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_padding_is_not_looked_for(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mpnet")

    def looked(*_: Any) -> None:
        raise AssertionError("the host reads token ids")

    monkeypatch.setattr(type(model), "warn_if_padding_and_no_attention_mask", looked, raising=False)
    with torch.inference_mode():
        expected = tiny("mpnet")(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
        script("_glue_variants").make_recordable(model)
        model.warn_if_padding_and_no_attention_mask(IDS, None)
        torch.testing.assert_close(model(input_ids=IDS).last_hidden_state, expected)
    assert "compute_position_bias" in vars(model.encoder)


def test_a_model_without_position_bias_stays_as_it_is(script: Script) -> None:
    model = tiny("bert")
    before = dict(vars(model.encoder))
    script("_glue_variants").reuse_position_bias(model)
    assert vars(model.encoder) == before


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand more")


def test_one_variant_that_fails_does_not_stop_the_others(script: Script) -> None:
    model = tiny("bert")
    own, variants = script("_glue_torch"), script("_glue_variants").variants_of(model, "minilm", ["70"], 1)
    variants[1] = script("_glue_variants").Variant("broken", {path: Broken() for path in variants[0].modules}, 1, "")
    with torch.inference_mode():
        found = own.times(model, variants, IDS, own.Column(2), 1, own.CompileBudget(0))
    assert [timed.failed for timed in found] == [None, "RuntimeError: no such kernel", *[None] * (len(variants) - 2)]
    assert [timed.seconds is not None and timed.seconds > 0 for timed in found] == [
        name != "broken" for name in (variant.name for variant in variants)
    ]


def test_layers_are_compiled_for_their_column_only_and_within_its_seconds(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("bert")
    own, variants = script("_glue_torch"), script("_glue_variants").variants_of(model, "minilm", ["70"], 1)
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        calls.append(1)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    column = own.Column(2, compiled=True)
    with torch.inference_mode():
        found = own.times(model, variants, IDS, column, 1, own.CompileBudget(60))
        assert [timed.failed for timed in found] == [None] * len(variants)
        assert all(timed.compile_seconds for timed in found)
        assert len(calls) == len(variants), "one compilation serves all layers of a variant"
        own.times(model, variants, IDS, own.Column(2), 1, own.CompileBudget(60))
        assert len(calls) == len(variants)
        late = own.times(model, variants, IDS, column, 1, own.CompileBudget(0, spent=1))
    assert {timed.failed for timed in late} == {"not compiled: 0 s of compiling were used up"}
    assert "forward" not in vars(model.encoder.layer[0])


def test_what_cannot_be_recorded_is_told_for_every_variant(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("bert")
    own, variants = script("_glue_torch"), script("_glue_variants").variants_of(model, "minilm", ["70"], 1)
    recorded: list[Any] = []

    def record(work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
        recorded.append(work().last_hidden_state)
        if len(recorded) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return partial(recorded.append, None)

    monkeypatch.setattr(own, "captured", record)
    with torch.inference_mode():
        found = own.times(model, variants, IDS, own.Column(2, graph=True), 1, own.CompileBudget(0))
        restore(model, variants[0].modules)
        assert torch.equal(recorded[0], model(input_ids=IDS).last_hidden_state)
    assert [timed.failed for timed in found] == [
        None,
        "RuntimeError: operation not permitted when stream is capturing",
        *[None] * (len(variants) - 2),
    ]
    outputs = [one for one in recorded if one is not None]
    assert len(outputs) == len(variants)
    assert not any(torch.equal(outputs[0], other) for other in outputs[1:]), "each recorded its own FFNs"
    assert len(recorded) > len(variants), "what was recorded is what is timed"


def test_exported_variants_take_turns_in_onnx_runtime(
    script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = tiny("mpnet")
    own, variants = script("_glue_onnx"), script("_glue_variants").variants_of(model, "minilm", ["70"], 1)
    split, none = variants[2], variants[-1]
    export = own.export
    written: list[str] = []

    def but_none(model: nn.Module, target: Path) -> None:
        written.append(target.name)
        if target.name.endswith("none"):
            raise ModelError("no graph of this")
        export(model, target)

    monkeypatch.setattr(own, "export", but_none)
    with torch.inference_mode():
        ready = own.sessions(model, [split, none], tmp_path, "mpnet", 1)
        own.sessions(model, [split], tmp_path, "mpnet", 1)
        found = own.times(ready, IDS, 1, time.perf_counter)
        feed = {"input_ids": IDS.numpy(), "attention_mask": torch.ones_like(IDS).numpy()}
        out = torch.from_numpy(ready[0].run(None, feed)[0])
        restore(model, split.modules)
        torch.testing.assert_close(out, model(input_ids=IDS).last_hidden_state, rtol=1e-3, atol=1e-4)
    assert written == ["mpnet ffsplit 70", "mpnet none"], "a graph that is there is not written again"
    assert [folder.name for folder in tmp_path.iterdir()] == ["mpnet ffsplit 70"]
    assert [timed.failed for timed in found] == [None, "ModelError: no graph of this"]
    assert [timed.seconds is None for timed in found] == [False, True]


def test_one_sequence_is_timed_more_often_on_a_cpu(script: Script) -> None:
    rounds_for = script("glue_speed").rounds_for
    assert rounds_for(9, 1, torch.device("cpu")) == 45
    assert rounds_for(9, 32, torch.device("cpu")) == rounds_for(9, 1, torch.device("cuda")) == 9


def test_names_of_the_results(script: Script) -> None:
    name = script("glue_speed").result_name
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert name(None, "torch", cpu, "float32", only=True) == "glue-speed-cpu"
    assert name(None, "torch", cpu, "bfloat16", only=True) == "glue-speed-cpu-bfloat16"
    assert name(None, "onnx", cpu, "float32", only=True) == "glue-speed-onnx-cpu"
    assert name(None, "torch", gpu, "tf32", only=True) == "glue-speed-gpu-tf32"
    assert name("mine", "torch", gpu, "tf32", only=True) == "mine"
    assert name("mine", "torch", gpu, "tf32", only=False) == "mine-tf32"


def test_widths_are_aligned(script: Script) -> None:
    options = script("glue_speed").options_of
    assert options([]).align == 16
    assert options(["--device", "cuda", "--dtype", "float32,tf32"]).align == 64
    assert options(["--device", "cuda", "--align", "8"]).align == 8
    assert options(["--dtype", "float32,tf32"]).dtype == ["float32", "tf32"]


@pytest.mark.parametrize(
    "arguments",
    [["--dtype", "float8"], ["--encoders", "bert"], ["--runtime", "onnx", "--device", "cuda"], ["--clock", "cpu"]],
)
def test_what_cannot_be_timed_is_refused(script: Script, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        script("glue_speed").options_of(arguments)


def rows(**of_broken: Any) -> list[dict[str, Any]]:
    place = {"encoder": "mpnet", "batch": 32, "graph": True, "compiled": True}
    return [
        {**place, "variant": "dense", "keep_ffn": 1.0, "milliseconds": 1234.0, "speed": 1.0},
        {**place, "variant": "svd 70", "keep_ffn": 0.3, "milliseconds": 617.0, "speed": 2.0},
        {**place, "variant": "prune 70", "keep_ffn": 0.29, **of_broken},
        {**place, "graph": False, "compiled": False, "variant": "none", "keep_ffn": 0, "milliseconds": 5, "speed": 3},
    ]


def test_the_table_tells_what_failed(script: Script) -> None:
    lines = script("glue_table").speeds(rows(failed="TritonMissing: no Triton"))
    assert lines == [
        "| variant | FFN kept | batch 32 | batch 32, compiled graph |",
        "|---|---|---|---|",
        "| dense | 1.000 | - | 1.00 (1,234 ms) |",
        "| svd 70 | 0.300 | - | 2.00 |",
        "| prune 70 | 0.290 | - | failed |",
        "| no FFN (the limit) | 0.000 | 3.00 | - |",
        "",
        "Failed (TritonMissing: no Triton): batch 32, compiled graph: prune 70.",
    ]


def test_the_table_tells_where_times_were_taken(script: Script) -> None:
    told = script("glue_table").circumstances
    old = {"dtype": "float32", "seq_len": 128, "provenance": {"hardware": {"accelerator": None, "threads": 2}}}
    assert told(old) == "CPU, 2 thread(s), torch, float32, sequence length 128"
    new = {**old, "runtime": "onnx", "clock": "cpu", "align": 16}
    assert told(new) == (
        "CPU, 2 thread(s), processor time, ONNX Runtime, float32, sequence length 128, widths in multiples of 16"
    )


def test_a_time_without_a_dense_one_is_in_the_table(script: Script) -> None:
    lines = script("glue_table").speeds(rows(milliseconds=12.345, speed=None))
    assert "| prune 70 | 0.290 | - | ? (12.3 ms) |" in lines


def test_a_run_writes_a_file_for_every_dtype(script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = script("glue_speed")
    monkeypatch.setattr(module, "built", lambda encoder, device, dtype: tiny("mpnet").to(dtype))
    monkeypatch.setattr(module, "SEQ_LEN", 16)
    arguments = [
        "glue_speed.py",
        "--dtype",
        "float32,bfloat16",
        "--encoders",
        "minilm",
        "--batches",
        "1",
        "--align",
        "4",
    ]
    monkeypatch.setattr("sys.argv", [*arguments, "--rounds", "1", "--folder", str(tmp_path)])
    module.main()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "glue-speed-cpu-bfloat16.json",
        "glue-speed-cpu.json",
    ]
    document = json.loads((tmp_path / "glue-speed-cpu.json").read_text(encoding="utf-8"))
    assert document["align"] == 4
    assert [row["variant"] for row in document["rows"]][:2] == ["dense", "svd 43.1"]
    assert len(document["rows"]) == 10
    assert document["rows"][0]["speed"] == 1
    lines = "\n".join(script("glue_table").speeds(document["rows"]))
    assert all(f"| {row['variant']} |" in lines for row in document["rows"] if row["variant"] != "none")


def test_rows_that_no_table_shows_are_refused(script: Script) -> None:
    has_place = script("glue_table").has_place
    assert has_place("mpnet", "stsb", "dense", "dense-twice")
    assert has_place("mpnet", "sst2", "70", "svd")
    assert has_place("minilm", "stsb", "43.1", "heavy-0.25")
    assert not has_place("minilm", "stsb", "70", "heavy-0.25")
    assert not has_place("mpnet", "stsb", "50", "svd")
    assert not has_place("mpnet", "stsb", "43.1", "a new way")
    assert not has_place("bert", "stsb", "43.1", "svd")
