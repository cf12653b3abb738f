"""Search: the same answer from any number of shards, true to exact MaxSim, honest about errors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest

from colbert_core.config import SearchConfig
from colbert_core.errors import DataError, DimensionError, IndexFormatError, NonFiniteError, SearchError
from colbert_core.index import (
    Codec,
    Filter,
    Searcher,
    add_documents,
    delete_documents,
    merge_hits,
    open_index,
)
from tests.clustered_vectors import build, make_corpus, make_queries, recall, train_codec

# The last hundred documents are added later, after the first twenty were deleted.
CORPUS = make_corpus(700)
BUILT, ADDED = CORPUS.part(range(600)), CORPUS.part(range(600, 700))
DELETED = BUILT.ids[:20]
QUERIES = make_queries(CORPUS, 500)
SHARDS = (1, 2, 3, 7)
# Every cut-off leaves something out; or nothing is cut off; or probes meet fewer documents than asked for.
CUTTING = SearchConfig(probes=3, candidates=60, rerank=25)
SETTINGS = [(CUTTING, 10), (SearchConfig(probes=64, candidates=700, rerank=700), 100), (CUTTING, 300)]
NO_PROBES = SearchConfig(probes=1, candidates=5, rerank=5)
FILTERS: dict[str, Filter | None] = {
    "all": None,
    "ids": CORPUS.ids[::3],
    "expression": (pc.field("colour") == "red") & (pc.field("number") < 500),
    "few": CORPUS.ids[:30],
    "none": [],
}


@pytest.fixture(scope="module")
def codec() -> Codec:
    return train_codec(BUILT)


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory, codec: Codec) -> Iterator[dict[int, Searcher]]:
    """The same documents, deletions and additions in 1, 2, 3 and 7 shards and one delta."""
    searchers = {}
    for shards in SHARDS:
        directory = build(tmp_path_factory.mktemp("index") / "i", codec, BUILT, shards)
        delete_documents(directory, DELETED)
        add_documents(directory, ADDED.ids, ADDED.vectors, ADDED.lengths, ADDED.metadata)
        searchers[shards] = open_index(directory, verify="full")
        assert len(searchers[shards].shards) == shards + 1
    yield searchers
    for searcher in searchers.values():
        searcher.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, codec: Codec) -> Iterator[Searcher]:
    """All documents in one shard."""
    searcher = open_index(build(tmp_path_factory.mktemp("index") / "i", codec, CORPUS))
    yield searcher
    searcher.close()


@pytest.mark.parametrize("condition", FILTERS)
@pytest.mark.parametrize(("settings", "k"), SETTINGS)
def test_any_number_of_shards_answers_as_one_does(
    indexes: dict[int, Searcher], settings: SearchConfig, k: int, condition: str
) -> None:
    queries = QUERIES if k == 10 else QUERIES[:40]
    expected = indexes[1].search(queries, k, settings, FILTERS[condition])
    assert all(expected) == (condition != "none")
    for shards in SHARDS[1:]:
        assert indexes[shards].search(queries, k, settings, FILTERS[condition]) == expected


@pytest.mark.parametrize("condition", FILTERS)
@pytest.mark.parametrize(("settings", "k"), [*SETTINGS, (NO_PROBES, 5), (NO_PROBES, 40)])
def test_merging_groups_answers_as_one_searcher_does(
    indexes: dict[int, Searcher], settings: SearchConfig, k: int, condition: str
) -> None:
    queries = QUERIES[:25]
    expected = indexes[1].search(queries, k, settings, FILTERS[condition])
    shards = indexes[7].shards
    for split in ([0, 8], [0, 4, 6, 8], list(range(9))):
        groups = [Searcher(indexes[7].codec, shards[a:b]) for a, b in pairwise(split)]
        parts = [group.search_partial(queries, k, settings, FILTERS[condition]) for group in groups]
        merged = [merge_hits([part[i] for part in parts]) for i in range(len(queries))]
        assert merged == expected
        top = [merge_hits([part[i] for part in parts], 2) for i in range(len(queries))]
        assert top == [hits[:2] for hits in expected]
        for group in groups:
            group.close()


def test_a_group_sends_little_more_than_the_answer(indexes: dict[int, Searcher]) -> None:
    parts = indexes[7].search_partial(QUERIES[:100], 10, CUTTING)
    assert np.mean([len(part.ids) for part in parts]) < 25
    assert np.mean([len(part.second_gather) for part in parts]) < 50


def test_parts_of_different_requests_do_not_merge(indexes: dict[int, Searcher]) -> None:
    (part,) = indexes[2].search_partial(QUERIES[:1], 10, CUTTING)
    with pytest.raises(SearchError, match="different settings"):
        merge_hits([part, replace(part, rerank=26)])
    for k in (0, 11):
        with pytest.raises(SearchError, match=f"k is {k}"):
            merge_hits([part], k)
    assert merge_hits([]) == []


def test_an_answer_does_not_depend_on_batch_or_threads(whole: Searcher, tmp_path: Path) -> None:
    expected = whole.search(QUERIES[:40], 10, CUTTING)
    assert [whole.search([query], 10, CUTTING)[0] for query in QUERIES[:40]] == expected
    assert whole.search(QUERIES[:40][::-1], 10, CUTTING) == expected[::-1]
    threaded = Searcher(whole.codec, whole.shards, threads=3)
    assert threaded.search(QUERIES[:40], 10, CUTTING) == expected
    assert [threaded.search([query], 10, CUTTING)[0] for query in QUERIES[:40]] == expected
    with ThreadPoolExecutor(4) as callers:
        answers = callers.map(lambda query: threaded.search([query], 10, CUTTING)[0], QUERIES[:40])
        assert list(answers) == expected
    threaded.close()


def test_probing_everything_is_exact_search(whole: Searcher) -> None:
    everything = SearchConfig(probes=64, candidates=700, rerank=700)
    for k in (10, 100):
        assert whole.search(QUERIES[:100], k, everything) == whole.search_exact(QUERIES[:100], k)


@pytest.mark.parametrize(
    ("bits", "at_10", "at_100", "tolerance"), [(8, 0.98, 0.98, 0.008), (4, 0.93, 0.95, 0.05)]
)
def test_exact_search_ranks_as_maxsim_of_the_original_vectors(
    tmp_path: Path, bits: int, at_10: float, at_100: float, tolerance: float
) -> None:
    """With 8 bits the ranking is that of brute force, but for documents whose scores are as good as equal."""
    searcher = open_index(build(tmp_path / "i", train_codec(CORPUS, bits=bits), CORPUS, 2))
    number = {name: i for i, name in enumerate(CORPUS.ids)}
    exact = [CORPUS.maxsim(query) for query in QUERIES[:100]]
    best = [[CORPUS.ids[i] for i in np.argsort(-scores, kind="stable")] for scores in exact]
    found = searcher.search_exact(QUERIES[:100], 100)
    assert recall([hits[:10] for hits in found], [names[:10] for names in best]) > at_10
    assert recall(found, [names[:100] for names in best]) > at_100
    for query, hits, scores in zip(QUERIES, found, exact, strict=False):
        true = np.array([scores[number[hit.id]] for hit in hits])
        slack = tolerance * len(query)
        assert np.abs(true - [hit.score for hit in hits]).max() < slack
        if bits == 8:
            assert np.all(np.maximum.accumulate(true[::-1])[::-1] - true < 2 * slack)
            missed = np.delete(scores, [number[hit.id] for hit in hits])
            assert missed.max() < true.min() + 2 * slack
    searcher.close()


def test_default_settings_find_what_exact_search_finds(whole: Searcher) -> None:
    found = whole.search(QUERIES[:100], 10, SearchConfig(probes=16, candidates=300, rerank=100))
    exact = whole.search_exact(QUERIES[:100], 10)
    assert recall(found, [[hit.id for hit in hits] for hits in exact]) > 0.97


def test_more_effort_finds_more(whole: Searcher) -> None:
    exact = [[hit.id for hit in hits] for hits in whole.search_exact(QUERIES[:100], 10)]
    efforts = [(1, 20, 10), (4, 100, 40), (16, 300, 150)]
    recalls = [
        recall(whole.search(QUERIES[:100], 10, SearchConfig(probes=p, candidates=c, rerank=r)), exact)
        for p, c, r in efforts
    ]
    assert recalls == sorted(recalls)
    assert recalls[0] < 0.9 < recalls[-1]


def test_scores_are_sums_over_the_query_tokens(whole: Searcher) -> None:
    query = QUERIES[3]
    shard = whole.shards[0]
    for hit in whole.search([query], 5)[0]:
        tokens = whole.codec.decode(shard.tokens(int(shard.find([hit.id])[0])))
        assert hit.score == pytest.approx(
            (tokens @ query.T).max(axis=0).sum(), abs=0.02 * np.sqrt(len(query))
        )


def test_ties_are_broken_by_id(tmp_path: Path, codec: Codec) -> None:
    """Forty copies of a document under ids that sort otherwise than they arrive."""
    rng = np.random.default_rng(0)
    copies = CORPUS.part([5] * 40)
    copies = replace(copies, ids=[f"copy-{i:02d}" for i in rng.permutation(40)])
    query = copies.vectors[: copies.lengths[0]]
    for shards in (1, 3):
        searcher = open_index(build(tmp_path / str(shards), codec, copies, shards))
        hits = searcher.search([query], 12, SearchConfig(candidates=40, rerank=40))[0]
        assert [hit.id for hit in hits] == [f"copy-{i:02d}" for i in range(12)]
        assert len({hit.score for hit in hits}) == 1
        searcher.close()


def test_k_beyond_the_documents_returns_all_of_them(indexes: dict[int, Searcher], whole: Searcher) -> None:
    for searcher, size in ((indexes[3], 680), (whole, 700)):
        assert len(searcher) == size
        for settings in (CUTTING, NO_PROBES):
            for hits in searcher.search(QUERIES[:3], 10_000, settings):
                assert len({hit.id for hit in hits}) == size


def test_as_many_as_asked_for_are_found_however_few_are_probed(whole: Searcher) -> None:
    for k in (1, 50, 400, 699):
        assert {len(hits) for hits in whole.search(QUERIES[:30], k, NO_PROBES)} == {k}


def test_given_documents_are_scored_as_in_a_search(indexes: dict[int, Searcher], whole: Searcher) -> None:
    query = QUERIES[0]
    exact = {hit.id: hit.score for hit in indexes[3].search_exact([query], 700)[0]}
    ids = [name for name in CORPUS.ids[::7] if name in exact]
    scores = indexes[3].score_documents(query, [*ids, ids[0]])
    assert scores.dtype == np.float32
    assert scores.tolist() == [exact[name] for name in [*ids, ids[0]]]
    assert indexes[3].score_known(query, [ids[0], "unknown", DELETED[0]]) == {ids[0]: exact[ids[0]]}
    for unknown in ("unknown", DELETED[0]):
        with pytest.raises(SearchError, match=f"no document '{unknown}'"):
            indexes[3].score_documents(query, [ids[0], unknown])
    assert indexes[3].score_documents(query, []).shape == (0,)


def test_records_hold_metadata_of_live_documents(indexes: dict[int, Searcher]) -> None:
    assert not {f"文書-{number}" for number in (3, 4, 5)} & set(DELETED)
    assert indexes[3].records(["文書-3", DELETED[0], "文書-4", "unknown"]) == {
        "文書-3": {"number": 3, "colour": "red"},
        "文書-4": {"number": 4, "colour": "green"},
    }
    assert indexes[3].records(["文書-5"], ["colour", "title"]) == {"文書-5": {"colour": None}}
    assert indexes[3].records(["文書-5"], []) == indexes[3].records(["文書-5"], ["title"]) == {}


def test_requests_that_make_no_sense_are_refused(whole: Searcher) -> None:
    good = QUERIES[0]
    for k in (0, -1, 2.5, True, None):
        with pytest.raises(SearchError, match="k is"):
            whole.search([good], k)  # type: ignore[arg-type]
    with pytest.raises(SearchError, match="query 1 has no token vectors"):
        whole.search([good, good[:0]], 5)
    with pytest.raises(DimensionError, match="query 1 is"):
        whole.search([good, good[:, :16]], 5)
    with pytest.raises(DimensionError, match="query 0 is"):
        whole.search([good[0]], 5)
    for value in (np.nan, np.inf, -np.inf):
        broken = good.copy()
        broken[-1, 3] = value
        for search in (whole.search, whole.search_exact, whole.search_partial):
            with pytest.raises(NonFiniteError, match="query 1"):
                search([good, broken], 5)
        with pytest.raises(NonFiniteError):
            whole.score_documents(broken, CORPUS.ids[:2])
    assert whole.search([], 5) == []


@pytest.mark.parametrize(
    "query", [np.zeros((3, 0)), [[1.0, 2.0], [3.0]], [["a"] * 32], [[10**400]], object()]
)
def test_what_is_no_matrix_of_numbers_is_no_query(whole: Searcher, query: Any) -> None:
    with pytest.raises(DimensionError, match="query 1 is"):
        whole.search([QUERIES[0], query], 5)


@pytest.mark.parametrize("ids", ["文書", [3], [CORPUS.ids[0], None], [[]], 7])
def test_documents_are_asked_for_by_a_list_of_strings(whole: Searcher, ids: Any) -> None:
    for ask in (whole.records, partial(whole.score_known, QUERIES[0]), whole.shards[0].find):
        with pytest.raises(DataError, match="string"):
            ask(ids)


def test_queries_need_no_unit_length(whole: Searcher) -> None:
    plain = whole.search(QUERIES[:5], 10)
    doubled = whole.search([4 * query for query in QUERIES[:5]], 10)
    assert [[hit.id for hit in hits] for hits in doubled] == [[hit.id for hit in hits] for hits in plain]
    assert doubled[0][0].score == pytest.approx(4 * plain[0][0].score)
    assert len(whole.search([np.zeros((4, 32))], 10)[0]) == 10
    assert whole.search([QUERIES[0].astype(np.float64)], 10) == plain[:1]
    assert whole.search([QUERIES[0].tolist()], 10) == plain[:1]


def test_a_searcher_needs_shards_of_its_codec(whole: Searcher) -> None:
    with pytest.raises(IndexFormatError, match="at least one shard"):
        Searcher(whole.codec, [])
    with pytest.raises(IndexFormatError, match="another codec"):
        Searcher(train_codec(CORPUS, seed=9), whole.shards)
    with pytest.raises(SearchError, match="threads is 0"):
        Searcher(whole.codec, whole.shards, threads=0)


def test_some_shards_of_an_index_can_be_opened_alone(tmp_path: Path, codec: Codec) -> None:
    directory = build(tmp_path / "i", codec, BUILT, 3)
    shutil.rmtree(directory / "shards" / "00000")
    some = open_index(directory, shards=["shards/00002", "shards/00001"])
    assert [shard.directory.name for shard in some.shards] == ["00002", "00001"]
    some.close()
    with pytest.raises(IndexFormatError, match="no shard 'shards/00009'"):
        open_index(directory, shards=["shards/00009"])
    with pytest.raises(IndexFormatError, match="no shards"):
        shutil.rmtree(directory / "shards")
        open_index(directory)
