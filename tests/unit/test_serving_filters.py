"""JSON filters against a real shard's metadata, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from colbert_core.config import CodecConfig
from colbert_core.errors import SearchError
from colbert_core.index import Codec, Searcher, Shard, write_shard
from serving.filters import MAX_DEPTH, parse_filter

ROWS = [
    {"id": "a", "topic": "music", "year": 2019, "score": 0.5, "open": True},
    {"id": "b", "topic": "music", "year": 2020, "score": 1.5, "open": False},
    {"id": "c", "topic": "travel", "year": 2021, "score": 2.5, "open": True},
    {"id": "d", "topic": None, "year": 2022, "score": None, "open": None},
    {"id": "e", "topic": "音楽", "year": None, "score": 3.5, "open": True},
]


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    vectors = np.random.default_rng(0).normal(size=(len(ROWS) * 8, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    codec = Codec.train(vectors, CodecConfig(centroids=4), total_tokens=len(vectors), threads=1)
    directory: Path = tmp_path_factory.mktemp("filters") / "shard"
    table = pa.Table.from_pylist([{key: row[key] for key in row if key != "id"} for row in ROWS])
    write_shard(directory, codec, [row["id"] for row in ROWS], vectors, [8] * len(ROWS), table)
    return Searcher(codec, [Shard.open(directory, codec)])


def selected(searcher: Searcher, tree: dict[str, Any]) -> str:
    query = np.ones((2, 16), np.float32)
    (hits,) = searcher.search([query], 10, filter=parse_filter(tree))
    return "".join(sorted(hit.id for hit in hits))


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"topic": "music"}, "ab"),
        ({"topic": "音楽"}, "e"),
        ({"topic": {"$eq": "music"}, "year": {"$gt": 2019}}, "b"),
        ({"topic": {"$ne": "music"}}, "ce"),
        ({"year": {"$gte": 2020, "$lt": 2022}}, "bc"),
        ({"year": {"$lte": 2019}}, "a"),
        ({"score": {"$gt": 2}}, "ce"),
        ({"open": True}, "ace"),
        ({"open": False}, "b"),
        ({"topic": None}, "d"),
        ({"topic": {"$ne": None}}, "abce"),
        ({"year": {"$in": [2019, 2022, 1]}}, "ad"),
        ({"topic": {"$in": ["travel", "音楽"]}}, "ce"),
        ({"$or": [{"topic": "travel"}, {"year": 2022}]}, "cd"),
        ({"$and": [{"open": True}, {"score": {"$lt": 3}}]}, "ac"),
        ({"$not": {"topic": "music"}}, "ce"),
        ({"open": True, "$not": {"$or": [{"topic": "music"}, {"topic": "travel"}]}}, "e"),
        ({"$ids": ["e", "a", "unknown"]}, "ae"),
    ],
)
def test_filters_select(searcher: Searcher, tree: dict[str, Any], expected: str) -> None:
    assert selected(searcher, tree) == expected


@pytest.mark.parametrize("tree", [{"$ids": []}, {"topic": {"$in": []}}, {"topic": "cooking"}])
def test_an_empty_selection_finds_nothing_rather_than_everything(
    searcher: Searcher, tree: dict[str, Any]
) -> None:
    assert selected(searcher, tree) == ""


@pytest.mark.parametrize(
    ("tree", "part"),
    [
        ({}, "filter: has no condition"),
        ({"$and": []}, r"filter\.\$and: expected a list"),
        ({"$or": [{}]}, r"filter\.\$or\.0: has no condition"),
        ({"$or": {"topic": "music"}}, r"filter\.\$or: expected a list"),
        ({"$not": ["x"]}, r"filter\.\$not: expected an object"),
        ({"topic": {}}, r"filter\.topic: has no condition"),
        ({"topic": {"$like": "m%"}}, r"filter\.topic\.\$like: no such comparison"),
        ({"$where": "1"}, r"filter\.\$where: no such operator"),
        ({"topic": ["music"]}, r"filter\.topic\.\$eq: expected a single value"),
        ({"topic": {"$in": "music"}}, r"filter\.topic\.\$in: expected a list"),
        ({"topic": {"$in": ["music", None]}}, r"filter\.topic\.\$in: expected"),
        ({"topic": {"$in": ["music", 3]}}, r"filter\.topic\.\$in: the values have no common type"),
        ({"year": {"$gt": None}}, r"filter\.year\.\$gt: null"),
        ({"year": 1 << 70}, r"filter\.year\.\$eq: .*too large"),
        ({"year": {"$in": [1 << 70]}}, r"filter\.year\.\$in"),
        ({"$ids": ["a"], "topic": "music"}, r"\$ids stands alone"),
        ({"$ids": "a"}, r"filter\.\$ids: expected a list"),
        ({"$ids": [1]}, r"filter\.\$ids: expected a list"),
        ({"$or": [{"$ids": ["a"]}, {"topic": "music"}]}, r"\$ids"),
        *(({"topic": value}, "surrogate") for value in ("\ud800", {"$in": ["\ud800"]}, {"$ne": "a\udfff"})),
        ({"a\ud800": "x"}, "surrogate"),
        ({"$ids": ["\ud800"]}, "surrogate"),
    ],
)
def test_a_filter_that_is_not_well_formed_is_refused_by_its_key(tree: dict[str, Any], part: str) -> None:
    with pytest.raises(SearchError, match=part):
        parse_filter(tree)


@pytest.mark.parametrize(
    ("tree", "part"),
    [
        ({"colour": "red"}, "colour"),
        ({"colour": {"$in": []}}, "colour"),
        ({"year": "not a number"}, "year"),
        ({"topic": {"$gt": 3}}, "topic"),
    ],
)
def test_a_filter_that_does_not_fit_the_metadata_is_refused(
    searcher: Searcher, tree: dict[str, Any], part: str
) -> None:
    with pytest.raises(SearchError, match=part):
        selected(searcher, tree)


def test_nesting_is_bounded() -> None:
    tree: dict[str, Any] = {"topic": "music"}
    for _ in range(MAX_DEPTH - 1):
        tree = {"$not": tree}
    parse_filter(tree)
    with pytest.raises(SearchError, match="deep"):
        parse_filter({"$not": tree})
