"""What holds between processes: loading with and without the import, and a killed run that goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import ffsplit
from tests.unit.checkpoint_helpers import PARTLY, PRUNE, SPLIT, compressed, ids
from tests.unit.evaluate_helpers import byte_tokenizer, tiny_llama

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

# Stored name -> (family, method, Auto class). All but the last need the import.
STORED: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", SPLIT, "AutoModelForCausalLM"),
    "gpt2": ("gpt2", SPLIT, "AutoModelForCausalLM"),
    "partly": ("llama", PARTLY, "AutoModelForCausalLM"),
    "bert": ("bert-mlm", SPLIT, "AutoModelForMaskedLM"),
    "stock": ("llama", PRUNE, "AutoModelForCausalLM"),
}

COMPARE = """
import torch
from safetensors.torch import load_file
expected = load_file("expected.safetensors")
with torch.no_grad():
    for name, auto in NAMES.items():
        logits = getattr(transformers, auto).from_pretrained(name).eval()(input_ids=expected["ids"]).logits
        torch.testing.assert_close(logits, expected[name], rtol=1e-5, atol=1e-5, msg=name)
print("all equal")
"""

REFUSED = """
transformers.utils.logging.set_verbosity_error()
tries = [("llama", "AutoModelForCausalLM"), ("llama", "AutoModel"), ("llama", "LlamaForCausalLM"),
         ("partly", "AutoModelForCausalLM"), ("gpt2", "AutoModel"), ("gpt2", "GPT2LMHeadModel"),
         ("bert", "AutoModel"), ("bert", "BertModel"), ("bert", "AutoModelForSequenceClassification")]
for name, auto in tries:
    try:
        getattr(transformers, auto).from_pretrained(name)
    except RuntimeError as error:
        assert "mismatched_sizes" in str(error), error
    else:
        print(f"{auto} loaded {name}")
print("all refused", flush=True)
transformers.AutoModelForCausalLM.from_pretrained("llama")
"""


def process(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-c", code], folder)


def run(arguments: list[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, and the logits that they must give."""
    place = tmp_path_factory.mktemp("processes")
    expected = {"ids": ids()}
    for name, (family, method, _) in STORED.items():
        result = compressed(family, method)
        saved = ffsplit.save(result, place / name)
        assert saved.kind == ("stock" if name == "stock" else "ffsplit")
        with torch.no_grad():
            expected[name] = result.model(input_ids=ids()).logits.clone()
    save_file(expected, place / "expected.safetensors")
    return place


@pytest.mark.parametrize(
    "imports",
    [
        "import ffsplit\nimport transformers\n",
        "import transformers\ntransformers.AutoModelForCausalLM, transformers.PreTrainedModel\nimport ffsplit\n",
        "import transformers\ntransformers.AutoConfig.from_pretrained('llama')\nimport ffsplit\n",
    ],
    ids=["import first", "import after", "import in the middle"],
)
def test_another_process_loads_the_same_model(imports: str, folder: Path) -> None:
    names = {name: auto for name, (_, _, auto) in STORED.items()}
    done = process(f"NAMES = {names}\n{imports}{COMPARE}", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("all equal")


def test_without_the_import_only_a_stock_checkpoint_loads(folder: Path) -> None:
    stock = "NAMES = {'stock': 'AutoModelForCausalLM'}\nimport transformers\n"
    done = process(stock + COMPARE + REFUSED, folder)
    assert done.stdout.split("\n") == ["all equal", "all refused", ""], done.stdout + done.stderr
    assert done.returncode != 0
    assert "mismatched_sizes" in done.stderr


# --- a killed run -----------------------------------------------------------------------------------------------------


def command(model: Path, out: Path) -> list[str]:
    budget = ["--recipe", "ffsplit", "--bits", "4"]
    amount = ["--samples", "24", "--seq-len", "64", "--device", "cpu"]
    return [sys.executable, "-m", "ffsplit", "compress", str(model), "--out", str(out), *budget, *amount]


def finished(journal: Path) -> list[Path]:
    return sorted(journal.glob("ffn-*.safetensors"))


def kill_in_the_middle(arguments: list[str], journal: Path, after: int) -> list[Path]:
    """Start a compression and kill it, without warning, once some FFNs are finished."""
    with open(os.devnull, "w") as nothing:
        running = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=nothing, stderr=nothing)
    try:
        deadline = time.monotonic() + 120
        while len(finished(journal)) < after:
            assert running.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "the run made no progress"
            time.sleep(0.005)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    return finished(journal)


def notes(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as stored:
        found: dict[str, Any] = json.loads(stored.metadata()["notes"])
    return found


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of eight layers, wide enough for every one to take a while."""
    place = tmp_path_factory.mktemp("dense")
    model: PreTrainedModel = tiny_llama(hidden_size=64, intermediate_size=512, num_hidden_layers=8)
    model.save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(dense: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    journal = tmp_path / "out.ffsplit-journal"
    kept = kill_in_the_middle(command(dense, out), journal, after=3)
    assert 3 <= len(kept) < 8
    assert [path.name for path in tmp_path.iterdir()] == [journal.name]
    before = [notes(file) for file in kept]

    again = run(command(dense, out))
    assert again.returncode == 0, again.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    layers = json.loads((out / "ffsplit_report.json").read_text())["layers"]
    assert len(layers) == 8
    assert layers[: len(before)] == before, "the finished FFNs were not taken over"

    whole = ffsplit.compress(dense, recipe="ffsplit", bits=4, samples=24, seq_len=64, device="cpu")
    ffsplit.save(whole, other)
    resumed, straight = load_file(out / "model.safetensors"), load_file(other / "model.safetensors")
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in resumed)
    assert (out / "config.json").read_bytes() == (other / "config.json").read_bytes()
