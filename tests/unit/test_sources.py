"""Labelled sources: what is read, and what is refused with file and row."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.sources import document_text, load_source, matching_files, open_data
from colbert_core.errors import DataError
from tests.tiny_data import data_recipe, write_source

CORPUS = [{"_id": "a", "title": "T", "text": "one"}, {"_id": "b", "title": "", "text": "two"}]
QUERIES = [{"_id": "1", "text": "first"}, {"_id": "2", "text": "second"}, {"_id": "3", "text": "third"}]
QRELS = [("1", "a", 1), ("1", "b", 2), ("2", "b", 0), ("3", "b", 1)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_source(tmp_path / "set", CORPUS, QUERIES, QRELS)
    return tmp_path


def test_reads_texts_with_titles_and_positive_labels(root: Path) -> None:
    source = load_source(data_recipe(root), "set")
    assert source.corpus == {"a": "T one", "b": "two"}
    assert source.qrels == {"1": {"a": 1, "b": 2}, "3": {"b": 1}}
    # A query whose only label is 0 has no relevant document.
    assert source.labelled_queries == {"1": "first", "3": "third"}


def test_jsonl_and_trec_labels_read_the_same(root: Path) -> None:
    folder = root / "set"
    for name, records in (("corpus", CORPUS), ("queries", QUERIES)):
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "qrels.txt").write_text("\n".join(f"{q} 0 {d} {n}" for q, d, n in QRELS))
    recipe = data_recipe(root)
    sources = {"corpus": "set/corpus.jsonl", "queries": "set/queries.jsonl", "qrels": "set/qrels.txt"}
    other = data_recipe(root, data={"root": str(root), "sources": {"set": sources}})
    assert load_source(recipe, "set") == load_source(other, "set")


@pytest.mark.parametrize(
    ("file", "records", "message"),
    [
        ("corpus", [{"_id": "a", "text": "x"}, {"_id": "a", "text": "y"}], r"row 2: id 'a' occurs twice"),
        ("corpus", [{"id": "a", "text": "x"}], r"no column '_id'; there are: id, text"),
        ("queries", [{"_id": 1, "text": "x"}], r"row 1: '_id' is int, not a string"),
        ("queries", [{"_id": "9", "text": "x"}], r"qrels.tsv row 2: no query '1'"),
        ("corpus", [{"_id": "z", "text": "x"}], r"qrels.tsv row 2: no document 'a'"),
    ],
)
def test_malformed_tables_are_refused_with_the_place(
    root: Path, file: str, records: list[dict[str, object]], message: str
) -> None:
    pq.write_table(pa.Table.from_pylist(records), root / "set" / f"{file}.parquet")
    with pytest.raises(DataError, match=message):
        load_source(data_recipe(root), "set")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1\ta\thigh\n1\ta\tmore\n", "row 2: the label 'more' is not a whole number"),
        (b"1\ta\t1\n1\ta\n", "row 2: 3 or 4 columns are expected, not 2"),
        (b"1\ta\t0.5\n", "row 1: the label '0.5' is not a whole number"),
        (b"1\ta\t1\n2\ta\t1\n1\ta\t0\n", "row 3: query '1', document 'a' has another label above"),
        (b"1\ta\t0\n", "no relevant document is labelled"),
        (b"1\ta\t1\n\xff\xfe\t1\n", "not UTF-8"),
    ],
)
def test_malformed_labels_are_refused_with_the_row(root: Path, content: bytes, message: str) -> None:
    (root / "set" / "qrels.tsv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_source(data_recipe(root), "set")


def test_a_first_row_of_labels_is_no_header(root: Path) -> None:
    (root / "set" / "qrels.tsv").write_bytes(b"1\ta\t1.0\n1\ta\t1\n3\tb\t2\n")
    assert load_source(data_recipe(root), "set").qrels == {"1": {"a": 1}, "3": {"b": 2}}


def test_missing_and_damaged_files_are_named(root: Path) -> None:
    (root / "set" / "corpus.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"set/corpus.parquet: not a Parquet file"):
        load_source(data_recipe(root), "set")
    (root / "set" / "corpus.parquet").unlink()
    with pytest.raises(DataError, match=r"no file 'set/corpus.parquet'"):
        load_source(data_recipe(root), "set")


def test_patterns_match_files_in_order(tmp_path: Path) -> None:
    for name in ("p/b.parquet", "p/a.parquet", "p/q/c.parquet", "p/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    recipe = data_recipe(tmp_path)
    assert matching_files(recipe, "p/*.parquet") == ["p/a.parquet", "p/b.parquet", "p/q/c.parquet"]
    assert matching_files(recipe, "p/[ab].parquet") == ["p/a.parquet", "p/b.parquet"]
    assert matching_files(recipe, "p/d.txt") == ["p/d.txt"]
    absolute = matching_files(recipe, f"{tmp_path}/p/?.txt")
    with open_data(recipe, absolute[0]) as handle:
        assert handle.read() == b"x"
    with pytest.raises(DataError, match=r"no file matches 'none/\*'"):
        matching_files(recipe, "none/*")


def test_document_text_puts_the_title_in_front() -> None:
    assert document_text("東京", "首都") == "東京 首都"
    assert document_text("", "首都") == document_text(None, "首都") == "首都"
