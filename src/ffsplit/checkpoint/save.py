"""Writing a compressed model: whole or not at all, reloaded and compared before it appears."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ffsplit.checkpoint.card import model_card
from ffsplit.checkpoint.quantizer import FFSplitQuantizer, FFSplitStorageConfig
from ffsplit.checkpoint.reload import reload_and_compare
from ffsplit.checkpoint.stock import stock_model
from ffsplit.errors import CheckpointError
from ffsplit.pipeline.result import PLAN_FILE, RECIPE_FILE, REPORT_FILE, CompressionResult
from ffsplit.plain import plain

Kind = Literal["stock", "ffsplit"]


@dataclass(frozen=True)
class SavedCheckpoint:
    """What was written.

    Attributes:
        directory: for `from_pretrained`.
        kind: ``stock`` loads in plain transformers, ``ffsplit`` after ``import ffsplit``.
        bytes: on disk, all files.
    """

    directory: Path
    kind: Kind
    bytes: int


def save(
    result: CompressionResult,
    directory: str | Path,
    *,
    verify: bool = True,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> SavedCheckpoint:
    """Write a directory that `from_pretrained` reads.

    A result that plain transformers can express is written as such; any other needs ``import ffsplit`` before it is
    loaded, and raises without it.

    Args:
        result: of :func:`ffsplit.compress`.
        directory: must not exist yet (or be empty) unless ``overwrite``.
        verify: load the files into a fresh model and compare its outputs with the model in memory.
        overwrite: replace an existing directory, once the new one is complete.
        max_shard_size: of the safetensors files.

    Raises:
        CheckpointError: the directory exists, the disk is too small or full, or the reloaded model differs. The
            target is then untouched.
    """
    # Resolved, so that "." has a name and parent, and a link's target is replaced on its own disk.
    target = Path(directory).resolve()
    refuse_existing(target, overwrite)
    model, kind = _to_write(result)
    with staged(target) as staging:
        _refuse_small_disk(model, target.parent)
        _write(result, model, kind, staging, max_shard_size)
        if verify:
            reload_and_compare(model, staging)
        size = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file())
        publish(staging, target)
    return SavedCheckpoint(Path(directory), kind, size)


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raise CheckpointError if the target holds something and may not be replaced."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} exists and is not a directory")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise CheckpointError(f"{target} exists and is not empty; choose another directory or allow overwriting")


def _to_write(result: CompressionResult) -> tuple[PreTrainedModel, Kind]:
    stock = None if result.plan.attention else stock_model(result.model, result.sites)
    if stock is not None:
        return stock, "stock"
    mark_compressed(result)
    return result.model, "ffsplit"


def mark_compressed(result: CompressionResult) -> None:
    """Give the model the configuration that lets transformers store and rebuild it."""
    model = result.model
    entries = [
        {"site": site.to_dict(), "spec": model.get_submodule(site.name).spec.model_dump(mode="json")}
        for site in result.sites
        if hasattr(model.get_submodule(site.name), "spec")
    ]
    gone = [planned.site.model_dump(mode="json") for planned in result.plan.attention]
    config = FFSplitStorageConfig(ffns=entries, attention=gone)
    model.config.quantization_config = config
    model.hf_quantizer = FFSplitQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method


def _write(result: CompressionResult, model: PreTrainedModel, kind: Kind, folder: Path, max_shard_size: str) -> None:
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if result.tokenizer is not None:
            result.tokenizer.save_pretrained(folder)
        recipe = yaml.safe_dump(result.recipe.model_dump(mode="json"), sort_keys=False)
        report = json.dumps(plain(result.report), indent=1, allow_nan=False)
        (folder / PLAN_FILE).write_text(result.plan.model_dump_json(indent=1), encoding="utf-8")
        (folder / RECIPE_FILE).write_text(recipe, encoding="utf-8")
        (folder / REPORT_FILE).write_text(report, encoding="utf-8")
        base = str(getattr(result.model.config, "_name_or_path", "") or "")
        card = model_card(result.report, result.plan, recipe, base, stock=kind == "stock")
        (folder / "README.md").write_text(card, encoding="utf-8")
        share_tensors(folder, like="README.md")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder.parent}: the checkpoint could not be written: {error}") from error


def share_tensors(folder: Path, like: str) -> None:
    """Safetensors files come readable by nobody else, whatever the umask says: give them another file's permissions."""
    mode = (folder / like).stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def _refuse_small_disk(model: PreTrainedModel, parent: Path) -> None:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(f"{parent}: the checkpoint needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A temporary sibling of the target, removed whatever happens."""
    staging = _sibling(target, "partial")
    try:
        # Not tempfile, which would make it private: the checkpoint gets the permissions of any new directory.
        staging.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sibling(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{suffix}")


def publish(staging: Path, target: Path) -> None:
    """Move the finished directory into place; an old one goes away only after that worked."""
    old = _sibling(target, "old") if target.exists() else None
    try:
        if old is not None:
            os.replace(target, old)
        os.replace(staging, target)
    except OSError as error:
        if old is not None and old.exists():
            os.replace(old, target)
        raise CheckpointError(f"{target}: the checkpoint could not be moved into place: {error}") from error
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
