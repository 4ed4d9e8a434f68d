"""Plain checkpoints that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
