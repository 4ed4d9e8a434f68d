"""Checkpoints that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffsplit.cli import checks
from ffsplit.cli.ours import MARK

if TYPE_CHECKING:
    from ffsplit.checkpoint.save import SavedCheckpoint
    from ffsplit.pipeline.result import CompressionResult


def write_compressed(
    result: CompressionResult, out: Path, *, verify: bool = True, overwrite: bool = False, mark: str = MARK
) -> SavedCheckpoint:
    """Write a checkpoint of ffsplit; only what has this mark is replaced.

    Raises:
        CheckpointError: something is in its place that may not be replaced, or it cannot be written.
    """
    from ffsplit.checkpoint.save import save

    # Checked before the work too; in the hours since, files may have come there.
    checks.check_output(out, overwrite=overwrite, mark=mark)
    return save(result, out, verify=verify, overwrite=overwrite)


def write_plain(out: Path, model: Any, tokenizer: Any | None) -> int:
    """Write a plain transformers checkpoint with its tokenizer; the bytes of all its files."""
    from ffsplit.checkpoint.save import publish, share_tensors, staged

    # Resolved, so that "." has a name and parent, and a link's target is filled on its own disk.
    target = out.resolve()
    with staged(target) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        share_tensors(folder, like="config.json")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        publish(folder, target)
    return size
