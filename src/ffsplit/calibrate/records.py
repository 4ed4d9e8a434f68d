"""Texts out of files of records: JSON, JSON lines, CSV, TSV and Parquet, gzipped or not."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from ffsplit.errors import DataError

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_CELL_LIMIT = 1 << 28


def data_suffix(path: Path) -> str:
    """The lower-case suffix that says what is inside: ``a.jsonl.gz`` -> ``.jsonl``, ``b.gz`` -> the empty string."""
    inner = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return inner.suffix.lower()


def read_records(path: Path, field: str | None, max_characters: int | None = None) -> list[str]:
    """The texts of one field of a file of records, in file order; empty values are left out.

    Args:
        path: a file whose :func:`data_suffix` is one of ``RECORD_SUFFIXES``.
        field: the field that holds the text, ``None`` for ``text``; ``a+b`` joins two fields of a record without a
            space; a number is a column, from 0, of a CSV or TSV file without a header.
        max_characters: stop after the record that reaches this many characters.

    Raises:
        DataError: the file is damaged or not UTF-8, or the field is absent or does not hold text.
    """
    return texts_of_rows(_rows(path, field), field, str(path), max_characters)


def texts_of_rows(
    rows: Iterable[Mapping[str, Any]], field: str | None, where: str, max_characters: int | None = None
) -> list[str]:
    """The texts of one field of the rows; see :func:`read_records`."""
    texts: list[str] = []
    characters = 0
    fields: tuple[str, ...] | None = None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: record {number} is a {type(row).__name__}, not an object with fields")
        fields = resolve_field(list(row), field, where) if fields is None else fields
        text = "".join(_value(row, name, where, number) for name in fields)
        if text.strip():
            texts.append(text)
            characters += len(text)
        if max_characters is not None and characters >= max_characters:
            break
    return texts


def table_rows(path: Path, columns: Sequence[str]) -> tuple[Sequence[str] | None, Iterator[Mapping[str, Any]]]:
    """The rows of a file of records with all their fields, and the names of the first row's; None if there is none.

    Args:
        path: a file whose :func:`data_suffix` is one of ``RECORD_SUFFIXES``.
        columns: what is looked for; if these are numbers, they are columns, from 0, of a table without a header.

    Raises:
        DataError: the file is damaged or not UTF-8.
    """
    rows = _whole_parquet_rows(path) if data_suffix(path) == ".parquet" else _rows(path, columns[0])
    first = next(rows, None)
    if first is None:
        return None, rows
    if not isinstance(first, Mapping):
        raise DataError(f"{path}: record 1 is a {type(first).__name__}, not an object with fields")
    return list(first), chain([first], rows)


def resolve_field(columns: Sequence[str], field: str | None, where: str) -> tuple[str, ...]:
    """The columns to join for ``field``: itself, the parts of ``a+b``, or ``text`` when it is not given."""
    wanted = "text" if field is None else field
    if wanted in columns:
        return (wanted,)
    parts = tuple(wanted.split("+"))
    if len(parts) > 1 and all(part in columns for part in parts):
        return parts
    problem = "no field was named and there is none called 'text'" if field is None else f"no field {field!r}"
    raise DataError(f"{where}: {problem}; the fields are {', '.join(repr(column) for column in columns)}")


@contextmanager
def reading(path: Path) -> Iterator[TextIO]:
    """The file as UTF-8 text, unpacked if its name ends in ``.gz``; what goes wrong becomes a :class:`DataError`."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as handle:
            yield handle
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start} of a block: {error.reason})") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _value(row: Mapping[str, Any], name: str, where: str, number: int) -> str:
    if name not in row:
        raise DataError(f"{where}: record {number} has no field {name!r}; it has {', '.join(map(repr, row))}")
    value = row[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} of record {number} holds a {type(value).__name__}, not text")
    return value


def _rows(path: Path, field: str | None) -> Iterator[Mapping[str, Any]]:
    suffix = data_suffix(path)
    if suffix == ".parquet":
        return _parquet_rows(path, field)
    if suffix == ".json":
        return _json_rows(path)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, field)
    return _json_lines(path)


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with reading(path) as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}: line {number} is not JSON ({error})") from error
                yield {"text": row} if isinstance(row, str) else row


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with reading(path) as handle:
        try:
            content = json.load(handle)
        except UnicodeDecodeError:
            raise  # a ValueError too, but `reading` has the better words for it
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON ({error}); a file with one record per line is named .jsonl") from error
    if not isinstance(content, list):
        raise DataError(f"{path}: holds a {type(content).__name__}; expected a list of texts or of objects with fields")
    yield from ({"text": row} if isinstance(row, str) else row for row in content)


def _csv_rows(path: Path, field: str | None) -> Iterator[Mapping[str, Any]]:
    previous = csv.field_size_limit(_CELL_LIMIT)
    try:
        with reading(path) as handle:
            first = handle.readline()
            handle.seek(0)
            # Files named .csv with tabs inside exist (the STS benchmark), and they do not quote.
            tabs = data_suffix(path) == ".tsv" or first.count("\t") > first.count(",")
            table = csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(handle)
            yield from _named_rows(table, field, path)
    except csv.Error as error:
        raise DataError(f"{path}: not a readable table ({error})") from error
    finally:
        csv.field_size_limit(previous)


def _named_rows(table: Iterator[list[str]], field: str | None, path: Path) -> Iterator[Mapping[str, Any]]:
    header = next(table, None)
    if header is None:
        return
    if field is not None and field.isdigit() and field not in header:
        yield {str(index): cell for index, cell in enumerate(header)}
        header = [str(index) for index in range(len(header))]
    for number, row in enumerate(table, start=2):
        if 0 < len(row) < len(header):
            raise DataError(f"{path}: row {number} has {len(row)} cells, the first row has {len(header)}")
        if row:
            yield dict(zip(header, row, strict=False))


def _parquet_rows(path: Path, field: str | None) -> Iterator[Mapping[str, Any]]:
    return _parquet(path, lambda names: resolve_field(names, field, str(path)))


def _whole_parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    return _parquet(path, lambda names: names)


def _parquet(path: Path, choose: Callable[[Sequence[str]], Sequence[str]]) -> Iterator[Mapping[str, Any]]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow; pip install ffsplit[data]") from error
    try:
        with parquet.ParquetFile(path) as table:
            columns = list(choose(table.schema_arrow.names))
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these two
        raise DataError(f"{path}: not a readable parquet file ({error})") from error
