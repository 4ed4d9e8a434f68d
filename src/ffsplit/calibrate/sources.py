"""SOURCE -> documents: the text that a model is calibrated or evaluated on, with a hash of exactly what was read."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from huggingface_hub import HfApi

from ffsplit.calibrate.builtin import BLANK_LINES, builtin_documents
from ffsplit.calibrate.records import (
    RECORD_SUFFIXES,
    data_suffix,
    read_records,
    reading,
    texts_of_rows,
)
from ffsplit.errors import DataError

Split: TypeAlias = Literal["calibration", "evaluation"]
Unit: TypeAlias = Literal["document", "paragraph", "line"]

FOLDER_SUFFIXES = (".md", ".txt")
HUB_CHARACTERS = 32_000_000
_HUB_SECONDS = 10.0
_FILE_SUFFIXES = (*RECORD_SUFFIXES, *FOLDER_SUFFIXES, ".gz", ".text", ".xml", ".html", ".rst")
_HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.+-]+))?(@(?P<split>[\w.]+(\[[\w:%]+\])?))?")
_HUB_SPLITS: dict[str, tuple[str, ...]] = {
    "calibration": ("train", "validation"),
    "evaluation": ("test", "validation"),
}


@dataclass(frozen=True)
class Texts:
    """Documents in reading order.

    Attributes:
        documents: the texts, none of them blank.
        name: what to call them in a report; a file's name without its folder.
        sha256: of the documents and where each one ends.
        split: which part of the source this is: ``calibration``, ``train``, ``test[:10%]``; ``all`` for a file.
        unit: what a single sequence is for a model that reads one sentence or paragraph at a time.
    """

    documents: tuple[str, ...]
    name: str
    sha256: str
    split: str = "all"
    unit: Unit = "document"

    @property
    def characters(self) -> int:
        return sum(map(len, self.documents))

    def joined(self) -> str:
        """One text: a single document as it is, several with one blank line between them."""
        return "\n\n".join(self.documents)

    def sequences(self) -> Iterator[str]:
        """The documents cut into ``unit``, without blank ones and without the space around them."""
        for document in self.documents:
            for piece in _pieces(document, self.unit):
                if stripped := piece.strip():
                    yield stripped


@dataclass(frozen=True)
class TextSource:
    """Where text comes from; :func:`load_texts` says what the fields may be."""

    source: str | Path | tuple[str, ...]
    field: str | None = None
    split: Split = "calibration"
    max_characters: int | None = None

    def load(self) -> Texts:
        """Read it now."""
        return load_texts(self.source, self.field, self.split, self.max_characters)


def load_texts(
    source: str | Path | Sequence[str] | TextSource | Texts,
    field: str | None = None,
    split: Split = "calibration",
    max_characters: int | None = None,
) -> Texts:
    """Read text.

    Args:
        source: ``builtin`` (the help topics that every CPython ships; one half for each split); a UTF-8 text file; a
            folder (all ``*.txt`` and ``*.md`` below it, sorted by path, one document each); a ``.jsonl``, ``.json``,
            ``.csv``, ``.tsv`` or ``.parquet`` file; any text file gzipped; a dataset of the hub,
            ``name[:config][@split]``; or a list of texts. A :class:`Texts` is returned as it is.
        field: the field of a record that holds the text; see :func:`ffsplit.calibrate.records.read_records`.
        split: which half of ``builtin``, and which split of a hub dataset when ``@split`` does not say: ``train`` to
            calibrate, ``test`` to evaluate, ``validation`` where those do not exist.
        max_characters: stop after the document that reaches this many; ``None`` reads everything, but no more than
            32 million characters of a hub dataset, which is streamed.

    Raises:
        DataError: the source is missing (with the nearest name there is), empty, damaged, not UTF-8, has no such
            field or, being plain text, none at all, or holds no text.
    """
    if isinstance(source, Texts):
        return source
    if isinstance(source, TextSource):
        return source.load()
    if split not in _HUB_SPLITS:
        raise DataError(f"split {split!r}: must be 'calibration' or 'evaluation'")
    if max_characters is not None and max_characters < 1:
        raise DataError(f"max_characters {max_characters}: must be at least 1")
    if not isinstance(source, str | Path):
        return _from_list(source, max_characters)
    if source == "builtin":
        _refuse_field(field, "builtin")
        return _texts(builtin_documents(split), "builtin", split, "paragraph", max_characters)
    return _from_place(source, field, split, max_characters)


def _from_list(source: Sequence[str], max_characters: int | None) -> Texts:
    documents = list(source)
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise DataError(f"texts[{index}] is a {type(document).__name__}, not text")
    return _texts(documents, "texts", "all", "document", max_characters)


def _from_place(source: str | Path, field: str | None, split: Split, max_characters: int | None) -> Texts:
    """A file, a folder or a dataset of the hub, decided by what exists and then by how it is spelt."""
    spelt = str(source)
    if not spelt.strip() or "\n" in spelt or len(spelt) > 1024 or max(map(len, spelt.split("/"))) > 255:
        raise DataError(f"source {spelt[:60]!r}: not a file, folder or dataset; to pass text itself, pass a list of it")
    path = Path(spelt).expanduser()
    if path.is_dir():
        _refuse_field(field, spelt)
        return _texts(_read_folder(path), f"{path.resolve().name}/", "all", "line", max_characters)
    if path.exists():
        if data_suffix(path) in RECORD_SUFFIXES:
            documents = read_records(path, field, max_characters)
            return _texts(documents, path.name, "all", "document", None)
        _refuse_field(field, spelt)
        return _texts([_read_text(path)], path.name, "all", "line", max_characters)
    match = _HUB_ID.fullmatch(spelt)
    if isinstance(source, Path) or match is None or _is_local(spelt, path):
        nowhere = "" if path.parent.is_dir() else f"; the folder {str(path.parent)!r} does not exist either"
        raise DataError(f"source {spelt!r}: no such file or folder{_nearest(path)}{nowhere}")
    return _from_hub(match, field, split, max_characters or HUB_CHARACTERS)


def _refuse_field(field: str | None, source: str) -> None:
    if field is not None:
        raise DataError(f"field {field!r}: source {source!r} is plain text, which has no fields; leave it out")


def _is_local(spelt: str, path: Path) -> bool:
    """Whether a name that does not exist was meant as a path: it is spelt like one, or its folder is there."""
    in_known_folder = "/" in spelt and path.parent.is_dir()
    return spelt.startswith((".", "/", "~")) or path.suffix.lower() in _FILE_SUFFIXES or in_known_folder


def _nearest(path: Path) -> str:
    """The sibling with the most similar name, as the end of a message."""
    if not path.parent.is_dir():
        return ""
    siblings = {sibling.name.lower(): sibling for sibling in path.parent.iterdir()}
    close = difflib.get_close_matches(path.name.lower(), siblings, n=1)
    return f"; did you mean {str(siblings[close[0]])!r}?" if close else ""


def _read_text(path: Path) -> str:
    with reading(path) as handle:
        text = handle.read()
    if "\0" in text:
        raise DataError(f"{path}: holds zero bytes, so it is not a text file")
    return text


def _read_folder(path: Path) -> list[str]:
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in FOLDER_SUFFIXES)
    if not files:
        raise DataError(f"{path}: no *.txt or *.md file in this folder; name a file for other formats")
    return [_read_text(file) for file in files]


def _from_hub(match: re.Match[str], field: str | None, split: Split, max_characters: int) -> Texts:
    spelt = match.group(0)
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"source {spelt!r}: no such file or folder here{_nearest(Path(spelt))}; to read it as a dataset of the "
            "hub, pip install ffsplit[data]"
        ) from error
    name, config = match["name"], match["config"]
    try:
        # One request that fails at once: the dataset library retries a wrong name for half a minute.
        HfApi().dataset_info(name, timeout=_HUB_SECONDS)
        part = match["split"] or _hub_split(datasets.get_dataset_split_names(name, config), split, spelt)
        rows = datasets.load_dataset(name, config, split=part, streaming=True)
        documents = texts_of_rows(rows, field, spelt, max_characters)
    except DataError:
        raise
    except Exception as error:  # the hub client raises the errors of every library beneath it
        raise DataError(
            f"source {spelt!r}: no such file or folder here{_nearest(Path(spelt))}, and the hub did not give a "
            f"dataset of that name ({type(error).__name__}: {str(error).strip()[:300]})"
        ) from error
    return _texts(documents, spelt if match["split"] else f"{spelt}@{part}", part, "document", None)


def _hub_split(available: Sequence[str], split: Split, spelt: str) -> str:
    for name in _HUB_SPLITS[split]:
        if name in available:
            return name
    raise DataError(f"source {spelt!r}: say which split for {split}, as {spelt}@NAME; there are {', '.join(available)}")


def _texts(documents: Sequence[str], name: str, split: str, unit: Unit, max_characters: int | None) -> Texts:
    kept: list[str] = []
    characters = 0
    for document in documents:
        if max_characters is not None and characters >= max_characters:
            break
        if document.strip():
            kept.append(document)
            characters += len(document)
    if not kept:
        raise DataError(f"source {name!r}: holds no text")
    return Texts(tuple(kept), name, _hash(kept, name), split, unit)


def _hash(documents: Sequence[str], name: str) -> str:
    """Sha256 over every document's length and bytes, so that moving a boundary changes it."""
    digest = hashlib.sha256()
    for index, document in enumerate(documents):
        try:
            content = document.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"source {name!r}: document {index} is not valid Unicode ({error.reason})") from error
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _pieces(document: str, unit: Unit) -> list[str]:
    if unit == "line":
        return document.splitlines()
    return BLANK_LINES.split(document) if unit == "paragraph" else [document]
