"""The pages in docs/ that are made from the code are up to date, and what they point to exists."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from ffsplit.budget.registry import entries
from ffsplit.ffn.lookup import LookupSpec
from ffsplit.ffn.projections import NM, STORAGES, Masked, Packed, Projection
from ffsplit.ffn.selectors import SELECTORS
from ffsplit.ffn.skips import SkipSpec
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.registry import methods
from ffsplit.ops.rounding import encode, fit_grid
from ffsplit.ops.sparsity import n_m_mask, rows_mask

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """``docs/generate.py``, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_methods_page_is_up_to_date(generator: ModuleType) -> None:
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(), "run `make docs`"


def test_methods_page_names_every_method_and_setting() -> None:
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    for name, method in methods().items():
        section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
        assert section is not None, name
        for setting in set(method.config.model_fields) - {"method"}:
            row = re.search(rf"^\| `{setting}` \| .+ \| .+ \| (.*) \|$", section[1], re.MULTILINE)
            assert row is not None, f"{name}.{setting} has no line"
            assert row[1], f"{name}.{setting} has no meaning"


def test_the_architecture_tells_what_sum_every_method_is() -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*) \|", page.split("## The way of the data")[0], re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([\w-]+)`", row)} - {"keep", "bits"} == set(entries())


def test_checkpoint_page_names_every_kind_and_tensor() -> None:
    page = (DOCS / "checkpoint.md").read_text(encoding="utf-8")
    kinds = [spec.model_fields["kind"].default for spec in (*STORAGES, *SELECTORS)]
    assert [kind for kind in kinds if f"| `{kind}` |" not in page] == []
    lookup = LookupSpec(d_model=4, tables=2, bits=2)
    full = SumSpec(d_model=4, lookup=lookup, skip=SkipSpec(d_model=4, sparsity=0.5, constant=True), bias=True)
    stored = SumFFN.empty(full, torch.nn.SiLU(), torch.float32, "meta").state_dict()
    assert [name for name in stored if f"`{name}`" not in page] == []


def test_survey_names_every_method_and_points_to_no_other() -> None:
    page = (DOCS / "survey.md").read_text(encoding="utf-8")
    linked = re.findall(r"\[`([\w-]+)`\]\(methods\.md#([\w-]+)\)", page)
    assert all(name == anchor for name, anchor in linked)
    assert {name for name, _ in linked} == set(entries()), "every method has its place in docs/survey.md"
    assert page.count("methods.md#") == len(linked)


def test_every_entry_of_the_survey_says_what_is_there() -> None:
    page = (DOCS / "survey.md").read_text(encoding="utf-8")
    rows = [row for row in re.findall(r"^\| (.+) \| (.+) \|$", page, re.MULTILINE) if row[0] not in ("entry", "---")]
    assert len(rows) > 60
    answers = ("**Yes**", "**In part**: ", "No: ", "No method of its own: ", "An analysis.", "Reading.")
    assert [entry for entry, told in rows if not told.startswith(answers)] == []
    assert [entry for entry, told in rows if told.startswith("**") and "](" not in told and "`" not in told] == []


def test_a_note_that_quotes_an_absent_row_is_refused(generator: ModuleType) -> None:
    with pytest.raises(KeyError, match="no row 'nothing'"):
        generator._filled("{nothing}", {"rows": []})


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_paths_that_the_pages_name_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`(src/ffsplit/[\w/.]+|benchmarks/[\w/.-]+|tests/[\w/.]+)`", text)
    links = re.findall(r"\]\(([\w/.-]+)(?:#[\w-]*)?\)", text)
    lost = [path for path in named if not (DOCS.parent / path).exists()]
    lost += [path for path in links if not (DOCS / path).exists()]
    assert lost == []


def test_speeds_of_whole_models_are_those_that_were_measured() -> None:
    page = (DOCS / "bench.md").read_text(encoding="utf-8")
    results = json.loads((DOCS.parent / "benchmarks" / "results" / "end-to-end-cpu.json").read_text(encoding="utf-8"))
    names = ("ffsplit", "int4", "w8a8", "prune-0.5", "none")
    for phase in results["phases"]:
        speeds = " | ".join(f"x{phase['speeds'][name]:.2f}" for name in names)
        assert f"| {phase['phase']} {phase['tokens']} | {1e3 * phase['seconds']['dense']:,.1f} | {speeds} |" in page


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    """The functions that docs/checkpoint.md gives for reading packed projections without ffsplit."""
    code = re.search(r"```python\n(.*?)\ntensors = ", (DOCS / "checkpoint.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    return names


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [24, 37])
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_packed_projections_can_be_read_without_ffsplit(
    reader: dict[str, Any], bits: int, columns: int, symmetric: bool, scale_bits: int
) -> None:
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(bits))
    grid = fit_grid(weight, bits, 16, symmetric=symmetric, scale_bits=scale_bits)
    options = {"bits": bits, "group": 16, "symmetric": symmetric}
    if bits == 4:
        options["input_scale"] = torch.rand(columns, generator=torch.Generator().manual_seed(0)).half()
    packed = Packed.from_codes(encode(weight, grid, bits), grid, **options)
    tensors = {f"here.{name}": tensor.numpy() for name, tensor in packed.state_dict().items()}
    read = reader["dense"](tensors, "here", packed.spec.model_dump())
    assert torch.equal(torch.from_numpy(read).float(), packed.dense())


@pytest.mark.parametrize("columns", [24, 37])
def test_sparse_projections_can_be_read_without_ffsplit(reader: dict[str, Any], columns: int) -> None:
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    stored: list[Projection] = [Masked.from_dense(weight, rows_mask(weight.abs(), 60))]
    stored += [NM.from_dense(weight, n_m_mask(weight.abs(), n, m), n, m) for n, m in ((2, 4), (4, 8), (3, 5), (1, 2))]
    for projection in stored:
        tensors = {f"here.{name}": tensor.detach().numpy() for name, tensor in projection.state_dict().items()}
        read = reader["sparse"](tensors, "here", projection.spec.model_dump())
        assert torch.equal(torch.from_numpy(read), projection.dense())


def test_a_checkpoint_can_be_read_without_ffsplit(reader: dict[str, Any], compressed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    tensors = load_file(compressed / "model.safetensors")
    ffns = json.loads((compressed / "config.json").read_text())["quantization_config"]["ffns"]
    assert len(ffns) == 2
    for ffn in ffns:
        name = ffn["site"]["name"]
        assert tensors[f"{ffn['site']['down']}.weight"].shape == (ffn["site"]["d_model"], 0)
        for index, branch in enumerate(ffn["spec"]["branches"]):
            for part in ("up", "gate", "down"):
                path = f"{name}.branches.{index}.{part}"
                read = torch.from_numpy(reader["dense"](tensors, path, branch[part])).float()
                assert torch.equal(read, model.get_submodule(path).dense())
