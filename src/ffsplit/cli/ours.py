"""Whether an output folder is ffsplit's own work, so that replacing it deletes nobody else's files."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ffsplit.errors import CheckpointError

MARK, FRONT, DEMO = "ffsplit_plan.json", "pareto.json", "ffsplit_demo.json"
"""The file that tells a checkpoint, a front or a demo from other directories."""

LISTS: dict[str, tuple[str, ...]] = {MARK: ("ffns",), FRONT: ("points", "choices", "checkpoints"), DEMO: ()}
"""What each of them holds at least. A demo's is empty until all is measured."""

CHECKPOINT = (
    "ffsplit_*.json", "ffsplit_recipe.yaml", "README.md",
    "config.json", "generation_config.json",
    "model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "vocab.json", "vocab.txt", "vocab.bpe", "entity_vocab.json", "dict.txt", "merges.txt", "bpe.codes",
    "normalizer.json", "emoji.json", "tokenizer.model", "spiece.model", "spm.model", "sentencepiece.model",
    "sentencepiece.bpe.model", "source.spm", "target.spm",
)  # fmt: skip
"""What `save` writes, and names that tokenizers of transformers give their files."""

PLOTS = ("pareto.svg", "pareto.png")
NAMED = 3


def check_ours(out: Path, mark: str) -> None:
    """A directory may be replaced: it has its mark, and nothing in it is anybody else's.

    Raises:
        CheckpointError: it has no mark, one that ffsplit did not write, or other files beside it.
    """
    if not (out / mark).is_file():
        raise CheckpointError(f"{out} holds no {mark}, so ffsplit did not write it and will not replace it")
    content = _content(out / mark)
    if content is None or not all(isinstance(content.get(key), list) for key in LISTS[mark]):
        raise CheckpointError(f"{out / mark} is not what ffsplit writes, so {out} will not be replaced")
    if others := _others(out, list(_front(content)) if mark == FRONT else CHECKPOINT):
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        raise CheckpointError(
            f"{out} holds what ffsplit did not write and will not delete: {', '.join(others[:NAMED])}{more}; "
            "move that away, or choose another directory"
        )


def _content(mark: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _front(content: dict[str, Any]) -> Iterator[str]:
    """Patterns of the files of a front: its own, and those of the checkpoints that it names."""
    yield from (FRONT, *PLOTS)
    entries = [entry for entry in content["checkpoints"] if isinstance(entry, dict)]
    for folder in [glob.escape(str(entry.get("directory"))) for entry in entries]:
        yield from (f"{folder}/{pattern}" for pattern in CHECKPOINT)


def _others(out: Path, patterns: Sequence[str]) -> list[str]:
    """Files below a directory that none of the patterns fits; links to directories count as files."""
    files = [path for path in out.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = sorted(path.relative_to(out).as_posix() for path in files)
    return [name for name in names if not any(_fits(name, pattern) for pattern in patterns)]


def _fits(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)  # for fnmatch, * may be a slash
