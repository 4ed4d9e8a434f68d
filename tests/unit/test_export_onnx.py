"""Checkpoints as ONNX graphs: what is written is our codes, and ONNX Runtime computes what torch computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer

import ffsplit
from ffsplit.errors import CheckpointError, ModelError, RecipeError
from ffsplit.export import run
from ffsplit.export.blocks import block_size
from ffsplit.export.check import cases, compare, float_inputs, session
from ffsplit.export.inputs import Signature, signature
from ffsplit.export.nodes import NBits, RowInt8
from ffsplit.export.storages import form, notes, refuse_inexpressible
from ffsplit.export.sums import MergedSum, exportable
from ffsplit.export.trace import GRAPH, trace_module
from ffsplit.ffn.lookup import LookupSpec
from ffsplit.ffn.projections import (
    NM,
    STORAGES,
    Dense,
    DenseSpec,
    Float8,
    Float8Spec,
    Int8Dynamic,
    Int8DynamicSpec,
    LowRank,
    Masked,
    OutlierColumns,
    Packed,
    PackedSpec,
    Projection,
    Tied,
    TiedSpec,
)
from ffsplit.ffn.spec import BranchSpec, SumSpec
from ffsplit.ffn.sum import Branch, SumFFN
from ffsplit.kernels import cpu
from ffsplit.kernels.dispatch import reference_only
from ffsplit.ops.rounding import encode, fit_grid
from ffsplit.ops.sparsity import n_m_mask, rows_mask
from tests.tiny import tiny
from tests.unit.checkpoint_helpers import SPLIT, compressed
from tests.unit.cli_fixtures import Call
from tests.unit.evaluate_helpers import byte_tokenizer, tiny_bert

D = 32


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * max(columns, 1) ** -0.5


def packed(rows: int, columns: int, bits: int = 4, group: int = 16, seed: int = 0, **options: bool) -> Packed:
    weight = matrix(rows, columns, seed)
    grid = fit_grid(weight, bits, group, symmetric=options.get("symmetric", False))
    return Packed.from_codes(encode(weight, grid, bits), grid, bits=bits, group=group, **options)


def int8(rows: int, columns: int, seed: int = 0) -> Int8Dynamic:
    return Int8Dynamic.from_dense(matrix(rows, columns, seed), Int8DynamicSpec(shape=(rows, columns)), torch.float32)


def low_rank(rows: int, columns: int, rank: int = 4) -> LowRank:
    return LowRank(matrix(rows, rank), matrix(rank, columns))


def scaled(rows: int, columns: int) -> Packed:
    weight = matrix(rows, columns, 3)
    grid = fit_grid(weight, 3, 16)
    scale = torch.linspace(0.5, 2, columns).half()
    return Packed.from_codes(encode(weight, grid, 3), grid, bits=3, group=16, input_scale=scale)


def outliers(rows: int, columns: int) -> OutlierColumns:
    return OutlierColumns(packed(rows, columns - 4), torch.tensor([3, 0, 9, 20]), matrix(rows, 4))


def test_projections_that_read_the_same_input_become_one_product_per_kind() -> None:
    heavy = Branch(nn.SiLU(), Dense(matrix(8, D)), Dense(matrix(D, 8)), Dense(matrix(8, D, 1)), torch.randn(8))
    light = Branch(nn.SiLU(), low_rank(24, D), low_rank(D, 24), low_rank(24, D), None, torch.randn(24))
    bare = Branch(None, Dense(matrix(6, D)), Dense(matrix(D, 6)))
    ffn = SumFFN(D, [heavy, light, bare], Dense(matrix(D, D)), torch.randn(D))
    x = torch.randn(2, 5, D)
    with torch.no_grad():
        expected = ffn(x)
        merged = exportable(ffn)
        assert isinstance(merged, MergedSum)
        assert len(merged.reader.nodes) == 1
        torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)


def test_what_is_stored_otherwise_is_decoded_or_kept_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SATURATES", False)  # else there is one more note
    weight = matrix(16, D)
    kept: list[Projection] = [Dense(weight), low_rank(16, D), int8(16, D), packed(16, D), outliers(16, D)]
    decoded = [Masked.from_dense(weight, rows_mask(weight.abs(), 200)), packed(16, D, group=20)]
    decoded += [NM.from_dense(weight, n_m_mask(weight.abs(), 2, 4), 2, 4)]
    decoded += [Float8.from_dense(weight, Float8Spec(shape=(16, D)), torch.float32)]
    assert {form(projection.spec) for projection in kept} == {"kept"}
    assert {form(projection.spec) for projection in decoded} == {"decoded"}
    spec = SumFFN(D, [Branch(nn.ReLU(), p, Dense(matrix(D, 16))) for p in (*kept, *decoded)]).spec
    told = notes([spec])
    assert len(told) == len(decoded) + 1
    assert told[0].startswith("1 projections (")
    assert "multiple of 16" in told[-1]
    assert notes([SumFFN(D, [Branch(nn.ReLU(), p, Dense(matrix(D, 16))) for p in kept]).spec]) == []


def test_a_decoded_storage_is_the_same_function() -> None:
    weight = matrix(16, D)
    stored: list[Projection] = [packed(16, D, group=20), low_rank(16, D, rank=0)]
    stored += [NM.from_dense(weight, n_m_mask(weight.abs(), 2, 4), 2, 4)]
    stored += [
        Tied(TiedSpec(shape=(16, D), owner="x", projection="up", rank=2), Dense(weight), weight[:, :2], weight[:2])
    ]
    for projection in stored:
        ffn = SumFFN(D, [Branch(nn.ReLU(), projection, Dense(matrix(D, 16)))])
        x = torch.randn(1, 3, D)
        with torch.no_grad():
            expected = ffn(x)
            torch.testing.assert_close(exportable(ffn)(x), expected, rtol=1e-5, atol=1e-6)


def test_every_storage_has_a_form() -> None:
    assert len({spec.model_fields["kind"].default for spec in STORAGES}) == len(STORAGES)
    unknown = SimpleNamespace(kind="new", shape=(2, 2))
    assert form(unknown) == "refused"  # type: ignore[arg-type]


def test_a_storage_that_no_graph_computes_is_refused_by_name() -> None:
    float8 = Float8Spec(shape=(16, D), activations=True)
    spec = SumSpec(d_model=D, branches=(BranchSpec(up=float8, down=DenseSpec(shape=(D, 16))),))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp: the storage 'float8' .* has no ONNX form"):
        refuse_inexpressible([("layers.1.mlp", spec)])
    tables = SumSpec(d_model=D, lookup=LookupSpec(d_model=D, tables=2, bits=2))
    with pytest.raises(ModelError, match=r"layers\.2\.mlp: lookup tables have no ONNX form"):
        refuse_inexpressible([("layers.2.mlp", tables)])


@pytest.mark.parametrize(
    ("columns", "group", "block"),
    [(256, 128, 128), (256, 64, 64), (96, 48, 16), (96, 24, None), (100, 100, 256), (640, 384, 128)],
)
def test_blocks_never_cross_groups(columns: int, group: int, block: int | None) -> None:
    assert block_size(PackedSpec(shape=(4, columns), bits=4, group=group)) == block


def test_inputs_of_encoders_and_decoders_are_told_from_class_and_configuration() -> None:
    def asked(name: str) -> Signature:
        model = tiny(name)
        return signature(type(model), model.config)

    assert asked("llama").kind == "decoder"
    assert asked("llama").names == ("input_ids", "attention_mask", "position_ids")
    assert asked("bert") == Signature("encoder", ("input_ids", "attention_mask", "token_type_ids"), 128, 64)
    assert asked("mpnet").names == ("input_ids", "attention_mask")
    for name, said in (("bart", "encoder-decoder"), ("vit", "pixel_values")):
        with pytest.raises(ModelError, match=said):
            asked(name)


# What follows runs ONNX Runtime.


def everything() -> SumFFN:
    """One of each kind of node, gated."""
    mixed = Branch(nn.SiLU(), packed(24, D, 8, 32), packed(D, 24, 4), packed(24, D, 8, 32, 1), torch.randn(24))
    light = Branch(nn.SiLU(), packed(40, D, 3, symmetric=True), packed(D, 40, 2, 32), scaled(40, D))
    rounded = Branch(nn.SiLU(), int8(16, D), int8(D, 16), int8(16, D, 1))
    apart = Branch(nn.SiLU(), outliers(16, D), low_rank(D, 16), scaled(16, D))
    return SumFFN(D, [mixed, light, rounded, apart], packed(D, D, 5, 32), torch.randn(D))


def test_onnx_runtime_computes_the_stored_codes_in_one_node_per_kind(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    ffn = everything()
    x = torch.randn(2, 7, D)
    x[0, 1] = 0
    with torch.no_grad(), reference_only():
        expected = ffn(x)
    module = exportable(ffn)
    trace_module(module, torch.randn(2, 3, D), tmp_path / GRAPH)
    nodes = [node.op_type for node in onnx.load(str(tmp_path / GRAPH), load_external_data=False).graph.node]
    assert nodes.count("MatMulNBits") == sum(isinstance(inside, NBits) for inside in module.modules())
    assert nodes.count("MatMulIntegerToFloat") == 3
    assert nodes.count("QuantizeLinear") == 2
    for graph, allowed in ((float_inputs(tmp_path / GRAPH), 1e-5), (tmp_path / GRAPH, 0.03)):
        running = session(graph, threads=1)
        (found,) = running.run(None, {running.get_inputs()[0].name: x.numpy()})
        assert (torch.from_numpy(found) - expected).norm() <= allowed * expected.norm()


@pytest.mark.parametrize("saturates", [False, True])
def test_int8_weights_are_unsigned_where_signed_ones_overflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saturates: bool
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    really = cpu.SATURATES
    monkeypatch.setattr(cpu, "SATURATES", saturates)
    codes = torch.full((4, 64), 127, dtype=torch.int8)  # with inputs of 127, the worst there is
    codes[1], codes[2, ::2] = -127, 0
    trace_module(RowInt8(codes, torch.ones(4)), torch.randn(2, 3, 64), tmp_path / GRAPH)
    stored = onnx.load(str(tmp_path / GRAPH)).graph.initializer
    kinds = {tensor.data_type for tensor in stored if list(tensor.dims) == [64, 4]}
    assert kinds == {onnx.TensorProto.UINT8 if saturates else onnx.TensorProto.INT8}
    matrix = Int8DynamicSpec(shape=(64, 64))
    told = notes([SumSpec(d_model=64, branches=(BranchSpec(up=matrix, down=matrix),))])
    assert [("written as uint8" in note) for note in told] == [True] * saturates
    if saturates or not really:
        running = session(tmp_path / GRAPH, threads=1)
        (found,) = running.run(None, {running.get_inputs()[0].name: torch.ones(1, 1, 64).numpy()})
        assert torch.from_numpy(found).flatten().tolist() == pytest.approx([64 * 127, -64 * 127, 32 * 127, 64 * 127])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, run.Exported]:
    """A small BERT, split in codes of two widths: checkpoint, ONNX directory, and what was told."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("onnx")
    bert = tiny_bert("AutoModel", num_hidden_layers=1, hidden_size=32, intermediate_size=64)
    ffsplit.save(compressed(bert, {**SPLIT, "bits": 8}, byte_tokenizer()), folder / "checkpoint")
    return folder / "checkpoint", folder / "onnx", run.export_onnx(folder / "checkpoint", folder / "onnx")


def test_an_exported_encoder_is_the_model(exported: tuple[Path, Path, run.Exported]) -> None:
    checkpoint, folder, told = exported
    assert told.kind == "encoder"
    assert told.difference < 1e-5
    assert told.rounded_difference is not None
    assert told.difference < told.rounded_difference < 0.05
    assert json.loads((folder / run.REPORT_FILE).read_text())["kind"] == "encoder"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert not list(folder.glob("float_inputs*"))
    texts = AutoTokenizer.from_pretrained(folder)(
        ["short", "a longer one"], return_tensors="pt", padding=True, return_token_type_ids=True
    )
    model = transformers.AutoModel.from_pretrained(checkpoint)
    running = session(folder / GRAPH)
    found = running.run(["last_hidden_state"], {i.name: texts[i.name].numpy() for i in running.get_inputs()})[0]
    with torch.no_grad():
        expected = model(**texts).last_hidden_state
    mask = texts["attention_mask"].bool()
    assert (torch.from_numpy(found)[mask] - expected[mask]).norm() < 0.05 * expected[mask].norm()


def test_a_graph_that_computes_something_else_is_refused(exported: tuple[Path, Path, run.Exported]) -> None:
    checkpoint, folder, _ = exported
    model = transformers.AutoModel.from_pretrained(checkpoint)
    answers = cases(model, signature(type(model), model.config))
    assert {tuple(case.inputs["input_ids"].shape) for case in answers} == {(2, 9), (1, 14)}
    compare(folder / GRAPH, answers, 0.05)
    wrong = replace(answers[1], expected={name: 1.2 * value for name, value in answers[1].expected.items()})
    with pytest.raises(CheckpointError, match="differs from torch's by"):
        compare(folder / GRAPH, [answers[0], wrong], 0.05)
    with pytest.raises(CheckpointError, match="which the model does not"):
        compare(folder / GRAPH, [replace(answers[0], expected={})], 0.05)


def test_inputs_can_stay_in_float32(exported: tuple[Path, Path, run.Exported], tmp_path: Path) -> None:
    checkpoint, folder, _ = exported
    model = transformers.AutoModel.from_pretrained(checkpoint)
    answers = cases(model, signature(type(model), model.config))
    for file in folder.glob("model.onnx*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    difference, rounded = run.compared(tmp_path / GRAPH, answers, allowed=1e-5, round_inputs=False)
    assert rounded is None
    assert compare(tmp_path / GRAPH, answers, 1e-5) == difference
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_an_export_that_differs_leaves_nothing(
    cli: Call, exported: tuple[Path, Path, run.Exported], untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(*_: Any, **__: Any) -> tuple[float, None]:
        raise CheckpointError("logits of ONNX Runtime differs from torch's by 0.5")

    monkeypatch.setattr(run, "write_graph", lambda *_: [])
    monkeypatch.setattr(run, "compared", differs)
    outcome = cli("export", exported[0], "--to", "onnx", "--out", untouched)
    assert outcome.code == 2
    assert "differs from torch's by 0.5" in outcome.err


def test_refusals_come_before_any_work(
    cli: Call, pruned: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for arguments, said in (
        ((pruned, "--to", "onnx", "--out", tmp_path / "full"), "not empty"),
        ((tmp_path / "nowhere", "--to", "onnx", "--out", untouched), "no such file"),
        ((pruned, "--to", "tflite", "--out", untouched), "onnx"),
    ):
        outcome = cli("export", *arguments)
        assert outcome.code == 2
        assert said in outcome.err
    monkeypatch.setattr(run, "PACKAGES", ("no_such_runtime",))
    with pytest.raises(RecipeError, match=r"needs no_such_runtime: pip install 'ffsplit\[onnx\]'"):
        run.export_onnx(pruned, untouched)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-mlm", "mpnet"])
@pytest.mark.parametrize("method", [SPLIT, {"method": "w8a8"}, {"method": "ffsplit", "keep": 0.5}], ids=str)
def test_families_export_and_are_the_model(family: str, method: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    ffsplit.save(compressed(family, method), tmp_path / "checkpoint")
    told = run.export_onnx(tmp_path / "checkpoint", tmp_path / "onnx")
    assert told.kind == ("decoder" if family in ("llama", "gpt2") else "encoder")
    assert told.difference < 1e-4 or method["method"] == "w8a8"
