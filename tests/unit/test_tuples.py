"""Published training sets: the three forms read the same, and every flaw is named with file and row."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.artifacts import ArtifactRef
from cluster.config import TupleFiles
from cluster.parts import part_name, read_part, upload_parts
from cluster.registry import Registry
from cluster.streams import TupleIndex
from cluster.tuples import TextTable, read_tuples
from colbert_core.errors import ConfigError, DataError, IntegrityError
from tests.tiny_data import data_recipe

QUERIES = {1: "first question", 2: "second question"}
DOCUMENTS = {10: "ten", 11: "eleven", 12: "twelve"}
EXPECTED = [
    {
        "query_id": "2",
        "query": "second question",
        "document_ids": ["11", "10", "12"],
        "documents": ["eleven", "ten", "twelve"],
        "scores": [1.0, 0.25, 0.0],
    },
    {
        "query_id": "1",
        "query": "first question",
        "document_ids": ["10", "12"],
        "documents": ["ten", "twelve"],
        "scores": [0.5, 0.75],
    },
]


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path)


def read(root: Path, **files: Any) -> list[dict[str, Any]]:
    return list(read_tuples(data_recipe(root), TupleFiles.model_validate(files)))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Query and document texts in every form that is read."""
    for name, key, table in (("queries", "query_id", QUERIES), ("documents", "document_id", DOCUMENTS)):
        write(tmp_path / f"{name}.parquet", [{key: i, "text": text} for i, text in table.items()])
        lines = [json.dumps({key: str(i), "text": text}) for i, text in table.items()]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        (tmp_path / f"{name}.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in table.items()))
    return tmp_path


@pytest.mark.parametrize("form", ["parquet", "jsonl", "tsv"])
def test_ids_and_mmarco_read_as_native_tuples(texts: Path, form: str) -> None:
    write(
        texts / "ids" / "train.parquet",
        [{key: row[key] for key in ("query_id", "document_ids", "scores")} for row in EXPECTED],
    )
    where = {"queries": f"queries.{form}", "documents": f"documents.{form}"}
    assert read(texts, format="ids", tuples="ids/*.parquet", **where) == EXPECTED
    released = [
        {
            "query_id": int(row["query_id"]),
            "pos_id": int(row["document_ids"][0]),
            "neg_ids": [int(i) for i in row["document_ids"][1:]],
            "pos_score": row["scores"][0],
            "neg_scores": row["scores"][1:],
        }
        for row in EXPECTED
    ]
    write(texts / "released.parquet", released)
    assert read(texts, format="mmarco", tuples="released.parquet", **where) == EXPECTED


def test_native_tuples_keep_their_ids_or_get_some(tmp_path: Path) -> None:
    write(tmp_path / "native" / "b.parquet", EXPECTED)
    bare = [{key: row[key] for key in ("query", "documents", "scores")} for row in EXPECTED]
    write(tmp_path / "native" / "a.parquet", bare)
    rows = read(tmp_path, format="tuples", tuples="native/*.parquet")
    assert rows[2:] == EXPECTED
    assert [row["documents"] for row in rows[:2]] == [row["documents"] for row in EXPECTED]
    assert rows[0]["query_id"] == "a-1" and rows[1]["document_ids"] == ["a-2-0", "a-2-1"]


GOOD = EXPECTED[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": []}, "the list of documents is empty"),
        ({"documents": None}, "the list of documents is empty"),
        ({"scores": [1.0]}, "2 documents, but 1 scores"),
        ({"scores": None}, "2 documents, but no scores"),
        ({"scores": [1.0, math.nan]}, "the score of document '12' is nan, not a finite number"),
        ({"scores": [math.inf, 1.0]}, "the score of document '10' is inf, not a finite number"),
        ({"document_ids": ["10", "10"]}, "document id '10' occurs twice"),
        ({"document_ids": ["10"]}, "2 documents, but 1 document ids"),
        ({"documents": ["ten", None]}, "document '12' is NoneType, not a string"),
        ({"query": None}, "the query is NoneType, not a string"),
    ],
)
def test_a_flawed_tuple_is_named_with_file_and_row(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write(tmp_path / "t.parquet", [*EXPECTED, GOOD | change])
    with pytest.raises(DataError, match=rf"^t.parquet row 3: {message}$"):
        read(tmp_path, format="tuples", tuples="t.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"document_ids": [10, 99]}, "no text for id '99' in documents.tsv"),
        ({"query_id": 3}, "no text for id '3' in queries.tsv"),
        ({"scores": [1.0]}, "2 document ids, but 1 scores"),
        ({"document_ids": []}, "the list of documents is empty"),
        ({"document_ids": [12, 12]}, "document id '12' occurs twice"),
        ({"query_id": None}, "None is NoneType, no id"),
    ],
)
def test_ids_without_a_text_and_short_lists_are_errors(
    texts: Path, change: dict[str, Any], message: str
) -> None:
    good = {"query_id": 1, "document_ids": [10, 12], "scores": [0.5, 0.75]}
    write(texts / "t.parquet", [good, good | change])
    with pytest.raises(DataError, match=rf"^t.parquet row 2: {message}$"):
        read(texts, format="ids", tuples="t.parquet", queries="queries.tsv", documents="documents.tsv")


def test_missing_columns_and_files_are_named(texts: Path) -> None:
    write(texts / "t.parquet", [{"query": "x", "documents": ["y"]}])
    with pytest.raises(DataError, match=r"t.parquet: no column 'scores'; there are: documents, query"):
        read(texts, format="tuples", tuples="t.parquet")
    where = {"queries": "queries.tsv", "documents": "documents.csv"}
    with pytest.raises(ConfigError, match=r"documents.csv: unknown form of texts"):
        read(texts, format="ids", tuples="t.parquet", **where)
    with pytest.raises(DataError, match=r"no file 'none.tsv'"):
        read(texts, format="ids", tuples="t.parquet", **(where | {"queries": "none.tsv"}))


def test_a_repeated_text_id_is_an_error_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("1\tone\n2\ttwo\n1\tone\n")
    with pytest.raises(DataError, match=r"^t.tsv row 3: id '1' occurs twice$"):
        TextTable(data_recipe(tmp_path), "t.tsv", "document_id", tmp_path / "scratch")
    (tmp_path / "u.tsv").write_text("1\tone\n2 two\n")
    with pytest.raises(DataError, match=r"^u.tsv row 2: expected id, tab, text$"):
        TextTable(data_recipe(tmp_path), "u.tsv", "document_id", tmp_path / "scratch2")


def test_parts_are_resumed_read_back_and_train(tmp_path: Path) -> None:
    recipe = data_recipe(tmp_path)
    registry = Registry.open(recipe.storage)
    rows = [
        {**EXPECTED[i % 2], "query_id": f"q{i}", "scores": [float(i), *EXPECTED[i % 2]["scores"][1:]]}
        for i in range(7)
    ]
    ref = ArtifactRef("data", "set", "v1")
    staged = registry.staging(ref)
    # A first job that got through three rows.
    assert upload_parts(staged, rows[:3], scored=True, rows_per_part=3) == {part_name(0): 3}
    first = staged.parts()[part_name(0)]
    counts = upload_parts(staged, rows, scored=True, rows_per_part=3)
    assert counts == {part_name(0): 3, part_name(1): 3, part_name(2): 1}
    assert staged.parts()[part_name(0)] == first
    staged.commit(expected=list(counts))
    read_back = [row for path in counts for row in read_part(registry, ref, path)]
    assert [row["query_id"] for row in read_back] == [row["query_id"] for row in rows]
    folder = registry.pull(ref)
    index = TupleIndex([str(folder / path) for path in counts])
    assert [t.scores.tolist() for t in index.read(0, 7, 2)] == [row["scores"][:2] for row in rows]


def test_a_damaged_part_is_refused(tmp_path: Path) -> None:
    registry = Registry.open(data_recipe(tmp_path).storage)
    ref = ArtifactRef("data", "set", "v1")
    staged = registry.staging(ref)
    upload_parts(staged, EXPECTED, scored=False)
    staged.commit()
    file = next((tmp_path / "store").rglob(part_name(0)))
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match="do not match their SHA-256"):
        read_part(registry, ref, part_name(0))
