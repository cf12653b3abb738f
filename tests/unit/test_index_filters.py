"""Filters: by ids and by metadata, nothing beyond them, and recall that does not fall as they narrow."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow.compute as pc
import pytest

from colbert_core.config import SearchConfig
from colbert_core.errors import SearchError
from colbert_core.index import Searcher, open_index, write_shard
from colbert_core.index.shard import Shard
from tests.clustered_vectors import build, make_corpus, make_queries, recall, train_codec

CORPUS = make_corpus(3000, topics=120)
QUERIES = make_queries(CORPUS, 60)
TIGHT = SearchConfig(probes=4, candidates=150, rerank=40)


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searcher]:
    codec = train_codec(CORPUS, centroids=128)
    searcher = open_index(build(tmp_path_factory.mktemp("filters") / "i", codec, CORPUS, 2))
    yield searcher
    searcher.close()


def numbers(hits: list) -> list[int]:
    return [int(hit.id.split("-")[1]) for hit in hits]


def test_only_listed_ids_are_found(searcher: Searcher) -> None:
    allowed = set(CORPUS.ids[::40])
    expected = searcher.search(QUERIES[:10], 20, TIGHT, allowed)
    for kind in (list(allowed), frozenset(allowed), dict.fromkeys(allowed), iter(allowed)):
        found = searcher.search(QUERIES[:10], 20, TIGHT, kind)
        assert found == expected
        for hits in found:
            assert len(hits) == 20
            assert {hit.id for hit in hits} <= allowed
    some = [CORPUS.ids[3], "unknown", CORPUS.ids[4]]
    assert {hit.id for hit in searcher.search(QUERIES[:1], 20, TIGHT, some)[0]} == {some[0], some[2]}


def test_only_matching_metadata_is_found(searcher: Searcher) -> None:
    red = pc.field("colour") == "red"  # every third number; the same number of documents has no colour
    for hits in searcher.search(QUERIES[:10], 20, TIGHT, red):
        assert len(hits) == 20
        assert all(number % 3 == 0 for number in numbers(hits))
    both = ~red & (pc.field("number") < 100)
    for hits in searcher.search(QUERIES[:10], 200, TIGHT, both):
        assert sorted(numbers(hits)) == list(range(1, 100, 3))
    missing = pc.field("colour").is_null() & pc.field("number").isin([2, 3, 5])
    assert sorted(numbers(searcher.search(QUERIES[:1], 9, TIGHT, missing)[0])) == [2, 5]


@pytest.mark.parametrize(
    "nothing", [[], set(), ["unknown"], pc.field("number") < 0, pc.field("colour") == "blue"]
)
def test_a_filter_that_nothing_passes_finds_nothing(searcher: Searcher, nothing: object) -> None:
    for search in (searcher.search, searcher.search_exact):
        assert search(QUERIES[:3], 5, filter=nothing) == [[], [], []]  # type: ignore[operator]


@pytest.mark.parametrize("share", [0.1, 0.01, 0.001])
def test_recall_holds_however_few_pass(searcher: Searcher, share: float) -> None:
    most = round(3000 * share)
    condition = pc.field("number") < most
    exact = [[hit.id for hit in hits] for hits in searcher.search_exact(QUERIES, 10, condition)]
    assert {len(names) for names in exact} == {min(10, most)}
    unfiltered = [[hit.id for hit in hits] for hits in searcher.search_exact(QUERIES, 10)]
    base = recall(searcher.search(QUERIES, 10, TIGHT), unfiltered)
    filtered = recall(searcher.search(QUERIES, 10, TIGHT, condition), exact)
    assert base < 0.98  # the settings are tight enough to show a loss
    assert filtered >= base


def test_a_filtered_score_is_the_unfiltered_one(searcher: Searcher) -> None:
    scores = {hit.id: hit.score for hit in searcher.search_exact(QUERIES[:1], 3000)[0]}
    for hit in searcher.search(QUERIES[:1], 50, TIGHT, CORPUS.ids[::5])[0]:
        assert hit.score == scores[hit.id]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (pc.field("shape") == "round", r"shape.*the columns are: number, colour"),
        (pc.field("number") == "three", "number"),
        (pc.field("number") + 1, "not true or false"),
        ("文書-1", "not the string"),
        (b"a", "not the string"),
        (7, "a filter is .*, not 7"),
        ([CORPUS.ids[0], 7], "a filter is .*id 1 is 7, not a string"),
        ([None], "a filter is .*id 0 is None"),
    ],
)
def test_filters_that_make_no_sense_are_refused(searcher: Searcher, condition: object, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        searcher.search(QUERIES[:1], 5, filter=condition)  # type: ignore[arg-type]


def test_a_shard_without_documents_has_no_say_in_a_filter(
    searcher: Searcher, tmp_path_factory: pytest.TempPathFactory
) -> None:
    part = CORPUS.part(np.arange(5))
    folder, codec = tmp_path_factory.mktemp("sparse"), searcher.codec
    write_shard(folder / "some", codec, part.ids, part.vectors, part.lengths, part.metadata)
    write_shard(folder / "none", codec, [], np.empty((0, codec.dim), np.float32), [])
    sparse = Searcher(codec, [Shard.open(folder / name, codec) for name in ("some", "none")])
    (hits,) = sparse.search(QUERIES[:1], 5, filter=pc.field("number") < 1500)
    assert sorted(numbers(hits)) == sorted(n for n in part.metadata["number"].to_pylist() if n < 1500) != []
    sparse.close()


def test_a_condition_needs_metadata(searcher: Searcher, tmp_path_factory: pytest.TempPathFactory) -> None:
    part = CORPUS.part(np.arange(5))
    directory = tmp_path_factory.mktemp("plain") / "s"
    write_shard(directory, searcher.codec, part.ids, part.vectors, part.lengths)
    plain = Searcher(searcher.codec, [Shard.open(directory, searcher.codec)])
    with pytest.raises(SearchError, match="the index has none"):
        plain.search(QUERIES[:1], 5, filter=pc.field("number") < 3)
    assert plain.records(part.ids) == {}
    plain.close()
