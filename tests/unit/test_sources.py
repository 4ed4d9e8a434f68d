from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

from ffsplit.calibrate import sources
from ffsplit.calibrate.builtin import BLANK_LINES, disjoint_halves
from ffsplit.calibrate.sources import Texts, TextSource, load_texts
from ffsplit.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_builtin_halves_share_no_paragraph_and_are_stable() -> None:
    halves = [load_texts("builtin", split=split) for split in ("calibration", "evaluation")]
    paragraphs = [
        [" ".join(part.split()) for text in half.documents for part in BLANK_LINES.split(text)] for half in halves
    ]
    assert not set(paragraphs[0]) & set(paragraphs[1])
    assert all(len(set(half)) == len(half) for half in paragraphs)
    assert all(half.characters > 100_000 for half in halves)
    assert load_texts("builtin").sha256 == halves[0].sha256 != halves[1].sha256
    assert [half.split for half in halves] == ["calibration", "evaluation"]


def test_a_quoted_paragraph_stays_with_the_topic_that_comes_first() -> None:
    halves = disjoint_halves({"b": "   one\n   two\n\nthree", "a": "one two", "c": "four"})
    assert halves == (["one two", "four"], ["three"])


def test_builtin_without_the_topics_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"without pydoc_data\.topics; name a text file"):
        load_texts("builtin")


def test_a_text_file_is_one_document_exactly_as_it_is(tmp_path: Path) -> None:
    content = " = Title = \n \n Grüße , world . \n"
    texts = load_texts(write(tmp_path / "a.txt", content))
    encoded = content.encode()
    assert texts.documents == (content,)
    assert texts.joined() == content
    assert texts.sha256 == hashlib.sha256(len(encoded).to_bytes(8, "little") + encoded).hexdigest()
    assert (texts.name, texts.split) == ("a.txt", "all")
    assert list(texts.sequences()) == ["= Title =", "Grüße , world ."]


def test_a_folder_gives_its_text_files_sorted(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, content in {"b.md": "two", "a.txt": "one", "c.py": "no", "sub/d.txt": "three", "e.txt": " \n"}.items():
        write(tmp_path / name, content)
    texts = load_texts(str(tmp_path))
    assert texts.documents == ("one", "two", "three")
    assert texts.joined() == "one\n\ntwo\n\nthree"
    assert texts.name == f"{tmp_path.name}/"


def test_the_hash_sees_document_boundaries() -> None:
    assert load_texts(["ab", "c"]).sha256 != load_texts(["a", "bc"]).sha256


def test_a_list_of_texts_drops_blank_ones() -> None:
    assert load_texts(["a b", " ", "", "c"]).documents == ("a b", "c")


def test_a_source_remembers_its_options(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"body": "x"}\n{"body": "y"}\n')
    source = TextSource(path, field="body", max_characters=1)
    assert source.load().documents == ("x",)
    assert load_texts(source) == source.load()
    texts = Texts(("x",), "n", "0")
    assert load_texts(texts) is texts


RECORDS = [{"text": "one", "other": "1"}, {"text": "", "other": "2"}, {"text": "two\tx", "other": "3"}]


def as_csv(delimiter: str) -> str:
    return "\n".join(["text,other".replace(",", delimiter), f'"o""ne"{delimiter}1', f"two{delimiter}2"]) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, RECORDS)), ("one", "two\tx")),
        ("strings.jsonl", '"one"\n\n"two"\n', ("one", "two")),
        ("a.json", json.dumps(RECORDS), ("one", "two\tx")),
        ("strings.json", '["one", "two"]', ("one", "two")),
        ("a.csv", as_csv(","), ('o"ne', "two")),
        ("a.tsv", as_csv("\t"), ('"o""ne"', "two")),
        ("tabs.csv", as_csv("\t"), ('"o""ne"', "two")),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_records(tmp_path: Path, name: str, content: str, expected: tuple[str, ...], zipped: bool) -> None:
    raw = content.encode()
    path = write(tmp_path / (f"{name}.gz" if zipped else name), gzip.compress(raw) if zipped else raw)
    assert load_texts(path).documents == expected


def test_a_gzipped_text_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xml.gz", gzip.compress("<a>é</a>".encode()))
    assert load_texts(path).documents == ("<a>é</a>",)


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    assert load_texts(write(tmp_path / "a.txt", b"\xef\xbb\xbfone")).documents == ("one",)


def test_a_table_without_a_header_is_read_by_column_number(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "5.0\tfirst\n1.0\tsecond\n")
    assert load_texts(path, field="1").documents == ("first", "second")


def test_two_fields_make_one_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prefix": "one t", "rest": "wo"}')
    assert load_texts(path, field="prefix+rest").documents == ("one two",)


def test_a_very_long_table_cell_is_read(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    path = write(tmp_path / "a.csv", "text,b\n" + "x" * 200_000 + ",1\n")
    assert load_texts(path).characters == 200_000
    assert csv.field_size_limit() == before


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), path)
    assert load_texts(path).documents == ("one", "two")
    with pytest.raises(DataError, match=r"no field 'body'; the fields are 'text', 'n'"):
        load_texts(path, field="body")
    with pytest.raises(DataError, match="record 1 holds a int, not text"):
        load_texts(path, field="n")
    with pytest.raises(DataError, match="not a readable parquet file"):
        load_texts(write(tmp_path / "b.parquet", "no"))


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install ffsplit\[data\]"):
        load_texts(write(tmp_path / "a.parquet", "x"))


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("a.txt", "", None, "holds no text"),
        ("a.txt", " \n\t\n", None, "holds no text"),
        ("a.txt", b"\xff\xfe\x00a", None, "not UTF-8"),
        ("a.bin", b"abc\x00def", None, "zero bytes"),
        ("a.txt.gz", b"not gzip", None, "damaged gzip"),
        ("a.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-12], None, "damaged gzip"),
        ("a.jsonl", "", None, "holds no text"),
        ("a.jsonl", '{"text": "a"}\n{oops', None, "line 2 is not JSON"),
        ("a.jsonl", '{"body": "a", "id": 1}', None, "none called 'text'; the fields are 'body', 'id'"),
        ("a.jsonl", '{"body": "a"}', "txt", "no field 'txt'; the fields are 'body'"),
        ("a.jsonl", '{"text": "a"}\n{"body": "b"}', None, "record 2 has no field 'text'"),
        ("a.jsonl", '{"text": ["a"]}', None, "field 'text' of record 1 holds a list, not text"),
        ("a.jsonl", "[1, 2]", None, "record 1 is a list, not an object"),
        ("a.jsonl", b'{"text": "\xff"}', None, "not UTF-8"),
        ("a.jsonl", '{"text": "\\ud800"}', None, "not valid Unicode"),
        ("a.json", b'["\xff"]', None, "not UTF-8"),
        ("a.json", '{"text": "a"}', None, "holds a dict; expected a list"),
        ("a.json", '{"text": "a"}\n{"text": "b"}', None, r"one record per line is named \.jsonl"),
        ("a.csv", "", None, "holds no text"),
        ("a.csv", "text,b\n", None, "holds no text"),
        ("a.csv", "a,b\n1,2\n", None, "the fields are 'a', 'b'"),
        ("a.csv", 'text,b\n"' + "x\n", "b", "row 2 has 1 cells, the first row has 2"),
    ],
)
def test_bad_files_are_refused(
    tmp_path: Path, name: str, content: str | bytes, field: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_texts(write(tmp_path / name, content), field=field)
    assert name in str(caught.value)


def test_a_missing_file_suggests_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path / "valid.txt", "x")
    (tmp_path / "corpus").mkdir()
    with pytest.raises(DataError, match=r"no such file or folder; did you mean .*valid\.txt"):
        load_texts(str(tmp_path / "vaild.txt"))
    with pytest.raises(DataError, match=r"did you mean .*corpus"):
        load_texts(tmp_path / "corpsu")
    with pytest.raises(DataError, match=r"the folder .* does not exist either"):
        load_texts(str(tmp_path / "nowhere" / "valid.txt"))


def test_a_relative_name_in_a_known_folder_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wiki").mkdir()
    with pytest.raises(DataError, match="no such file or folder; did you mean 'data/wiki'"):
        load_texts("data/wikki")


def test_a_folder_without_text(tmp_path: Path) -> None:
    write(tmp_path / "a.py", "x")
    with pytest.raises(DataError, match=r"no \*\.txt or \*\.md file"):
        load_texts(tmp_path)


@pytest.mark.parametrize("source", ["builtin", "{folder}", "{folder}/a.txt"])
def test_a_field_of_plain_text_is_refused(source: str, tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "some text")
    with pytest.raises(DataError, match=r"field 'body': source .* has no fields"):
        load_texts(source.format(folder=tmp_path), field="body")


@pytest.mark.parametrize("source", ["", "one line\nand another", "x" * 5000])
def test_text_in_place_of_a_source_is_refused(source: str) -> None:
    with pytest.raises(DataError, match="pass a list of it"):
        load_texts(source)


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """Let a wrong type through to the code's own refusal where the suite runs with a run-time type checker."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.usefixtures("unchecked_types")
def test_bad_arguments() -> None:
    with pytest.raises(DataError, match=r"texts\[1\] is a int"):
        load_texts(["a", 2])  # type: ignore[list-item]
    with pytest.raises(DataError, match="holds no text"):
        load_texts([])
    with pytest.raises(DataError, match="split 'test'"):
        load_texts("builtin", split="test")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="max_characters 0"):
        load_texts("builtin", max_characters=0)


class Hub:
    """Stands for the datasets package and counts the rows that were drawn."""

    def __init__(self, splits: tuple[str, ...] = ("train", "test"), error: Exception | None = None) -> None:
        self.splits, self.error, self.drawn = splits, error, 0

    def get_dataset_split_names(self, name: str, config: str | None) -> list[str]:
        return list(self.splits)

    def load_dataset(self, name: str, config: str | None, split: str, streaming: bool):  # type: ignore[no-untyped-def]
        if self.error is not None:
            raise self.error
        for _ in range(1000 if streaming else 0):
            self.drawn += 1
            yield {"text": f"{name} {config} {split}"}


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.HfApi, "dataset_info", lambda self, name, timeout: None)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("source", "split", "document", "name"),
    [
        ("org/set", "calibration", "org/set None train", "org/set@train"),
        ("org/set:small", "evaluation", "org/set small test", "org/set:small@test"),
        ("set@validation[:10%]", "evaluation", "set None validation[:10%]", "set@validation[:10%]"),
    ],
)
def test_a_hub_dataset_is_streamed_until_there_is_enough(
    monkeypatch: pytest.MonkeyPatch, source: str, split: str, document: str, name: str
) -> None:
    hub = Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)  # type: ignore[arg-type]
    texts = load_texts(source, split=split, max_characters=3 * len(document) - 1)  # type: ignore[arg-type]
    assert texts.documents == (document,) * 3
    assert texts.name == name
    assert hub.drawn == 3


@pytest.mark.usefixtures("online")
def test_a_hub_dataset_without_a_fitting_split_or_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Hub(splits=("train",)))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"say which split for evaluation, as org/set@NAME; there are train"):
        load_texts("org/set", split="evaluation")
    monkeypatch.setitem(sys.modules, "datasets", Hub(error=ConnectionError("offline")))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"no such file or folder here.*ConnectionError: offline"):
        load_texts("org/set")


def test_an_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)  # type: ignore[arg-type]

    def refuse(self: object, name: str, timeout: float) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(sources.HfApi, "dataset_info", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    with pytest.raises(DataError, match=r"did you mean 'corpus'\?, and the hub .*ConnectionError: no route"):
        load_texts("corpuss")
    assert hub.drawn == 0


def test_a_hub_dataset_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install ffsplit\[data\]"):
        load_texts("org/set")
