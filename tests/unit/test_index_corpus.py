"""Splitting a corpus into chunks: nothing lost, nothing twice, and every place a function of the id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster import index_corpus
from cluster.artifacts import ArtifactRef
from cluster.config import Recipe
from cluster.index_corpus import (
    BuildArea,
    Chunk,
    ChunkRecord,
    Counts,
    corpus_files,
    corpus_state,
    cut_shard,
    sample_place,
    split_file,
)
from cluster.registry import Registry
from colbert_core.errors import DataError
from colbert_core.index import shard_of
from tests.tiny_data import data_recipe, write_source

SHARDS = 3


def documents(count: int) -> list[dict[str, Any]]:
    return [{"_id": f"文書{i}", "title": f"t{i}" if i % 2 else "", "text": f"text {i}"} for i in range(count)]


def source(root: Path, name: str, corpus: list[dict[str, Any]]) -> None:
    write_source(root / name, corpus, [{"_id": "q", "text": "?"}], [("q", corpus[0]["_id"], 1)])


def area_of(recipe: Recipe) -> BuildArea:
    return BuildArea(Registry.open(recipe.storage).store, ArtifactRef("indexes", "i", "v"))


def cut(recipe: Recipe, *names: str) -> tuple[BuildArea, list[Chunk]]:
    area = area_of(recipe)
    files = corpus_files(recipe, names)
    for number, path in enumerate(files):
        split_file(recipe, path, number, SHARDS, area)
    area.keep_chunks([cut_shard(files, shard, 7, area) for shard in range(SHARDS)])
    chunks = area.chunks()
    assert chunks is not None
    return area, chunks


def test_every_document_is_in_one_chunk_of_its_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_corpus, "CHUNK_DOCUMENTS", 16)
    monkeypatch.setattr(index_corpus, "BUFFER_CHARACTERS", 1000)
    given = documents(200)
    source(tmp_path, "a", given)
    area, chunks = cut(data_recipe(tmp_path), "a")
    found: dict[str, tuple[str | None, str]] = {}
    for chunk in chunks:
        rows = area.documents(chunk).to_pylist()
        assert len(rows) == chunk.documents <= 16
        places = [sample_place(row["id"], 7) for row in rows]
        assert places == sorted(places)
        for row in rows:
            assert shard_of(row["id"], SHARDS) == chunk.shard
            assert row["id"] not in found
            found[row["id"]] = (row["title"], row["text"])
    assert found == {row["_id"]: (row["title"] or None, row["text"]) for row in given}
    assert {chunk.shard for chunk in chunks} == set(range(SHARDS))


def test_places_in_the_sample_are_what_they_were() -> None:
    # A build that goes on, with a later release too, must find its chunks in the order of their places.
    assert [sample_place("d0", 1), sample_place("d0", 2)] == [5221038325738262816, 3295840685453140791]
    places = [sample_place(str(i), 1) / 2**64 for i in range(4000)]
    assert 0.45 < sum(places) / len(places) < 0.55


def test_sources_may_share_documents(tmp_path: Path) -> None:
    source(tmp_path, "a", documents(30))
    source(tmp_path, "b", documents(40)[20:])
    area, chunks = cut(data_recipe(tmp_path), "a", "b")
    ids = [row["id"] for chunk in chunks for row in area.documents(chunk).to_pylist()]
    assert sorted(ids) == sorted(row["_id"] for row in documents(40))


def test_sources_of_one_file_read_it_once(tmp_path: Path) -> None:
    source(tmp_path, "a", documents(5))
    shared = {"corpus": "a/corpus.parquet", "queries": "a/queries.parquet", "qrels": "a/qrels.tsv"}
    recipe = data_recipe(tmp_path, data={"sources": {"train": shared, "test": shared}})
    assert corpus_files(recipe, ["train", "test"]) == ["a/corpus.parquet"]


def test_one_id_for_two_documents_is_refused(tmp_path: Path) -> None:
    given = documents(30)
    source(tmp_path, "a", given)
    source(tmp_path, "b", [{**given[3], "text": "another"}])
    source(tmp_path, "c", [*given[:5], given[2]])
    recipe = data_recipe(tmp_path)
    with pytest.raises(
        DataError, match=r"b/corpus.parquet row 1: id '文書3' has another text in a/corpus.parquet row 4"
    ):
        cut(recipe, "a", "b")
    with pytest.raises(DataError, match=r"c/corpus.parquet row 6: id '文書2' occurs twice, first in row 3"):
        cut(recipe, "c")


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    source(tmp_path, "a", documents(3))
    lines = [{"_id": "x", "text": "fine"}, {"_id": "y", "text": "half \ud83d"}]
    (tmp_path / "a" / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sources = {"corpus": "a/corpus.jsonl", "queries": "a/queries.parquet", "qrels": "a/qrels.tsv"}
    recipe = data_recipe(tmp_path, data={"sources": {"a": sources}})
    with pytest.raises(DataError, match=r"a/corpus.jsonl row 2: not valid Unicode"):
        cut(recipe, "a")


def test_records_come_back_and_everything_is_cleared(tmp_path: Path) -> None:
    source(tmp_path, "a", documents(3))
    area, chunks = cut(data_recipe(tmp_path), "a")
    assert area.encoded() == set()
    record = ChunkRecord(16, ["文書0", "b"], [3, 4], 1, 2)
    area.keep_record(chunks[0], record)
    assert area.encoded() == {chunks[0].name}
    assert area.record(chunks[0]) == record
    assert record.counts == Counts(2, 7, 1, 2)
    area.clear()
    assert area.chunks() is None
    assert list(area.store.list()) == []


def test_another_corpus_starts_afresh(tmp_path: Path) -> None:
    source(tmp_path, "a", documents(3))
    recipe = data_recipe(tmp_path)
    files = corpus_files(recipe, ["a"])
    area_of(recipe).begin({"corpus": corpus_state(recipe, files)})
    area, _ = cut(recipe, "a")
    area.begin({"corpus": corpus_state(recipe, files)})
    assert area.chunks() is not None
    source(tmp_path, "a", documents(4))
    area.begin({"corpus": corpus_state(recipe, files)})
    assert area.chunks() is None
    assert len(list(area.store.list())) == 1


def test_row_files_hold_nothing_of_other_shards(tmp_path: Path) -> None:
    source(tmp_path, "a", documents(20))
    recipe = data_recipe(tmp_path)
    area = area_of(recipe)
    assert split_file(recipe, "a/corpus.parquet", 0, SHARDS, area) == 20
    rows = 0
    for shard in range(SHARDS):
        with area.store.open(area.rows_key(0, shard)) as handle:
            table = pq.read_table(handle)
        rows += len(table)
        assert all(shard_of(key, SHARDS) == shard for key in table["id"].to_pylist())
    assert rows == 20
