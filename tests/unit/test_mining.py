"""Mining: what may be a negative, where it comes from, and that it depends on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cluster.config import Mining
from cluster.mining import MinedTuples, candidate_rows, chain_groups, mine
from cluster.scorers import Candidates, Scorer, rank
from cluster.sources import LabelledSource
from colbert_core.errors import DataError
from colbert_core.exact import Ranking

DOCUMENTS = 60


class ByDistance(Scorer):
    """Document i has the score 100 - |i - query number|: rankings are known beforehand."""

    def __init__(self, source: LabelledSource, shift: int = 0) -> None:
        super().__init__("distance", source)
        self.shift = shift

    def _score(self, query: str, document: str) -> float:
        return 100.0 - abs(int(document[1:]) - int(query[1:]) - self.shift)

    def score_candidates(self, candidates: Candidates) -> list[NDArray[np.float32]]:
        return [
            np.asarray([self._score(query, document) for document in ids], dtype=np.float32)
            for query, ids in zip(candidates.query_ids, candidates.document_ids, strict=True)
        ]

    def search(self, query_ids: Sequence[str], depth: int) -> Ranking:
        ids = list(self.require_source().corpus)
        return rank(ids, [ids] * len(query_ids), self.score(query_ids, [ids] * len(query_ids)), depth)


def source(queries: int = 30, documents: int = DOCUMENTS, order: int = 1) -> LabelledSource:
    ids = [f"q{i:02d}" for i in range(queries)][::order]
    return LabelledSource(
        "numbers",
        {f"d{i:02d}": f"text {i}" for i in range(documents)},
        {query: f"question {query}" for query in ids},
        # Two positives; the second one has the higher label.
        {query: {f"d{int(query[1:]):02d}": 1, f"d{int(query[1:]) + 1:02d}": 2} for query in ids},
    )


def mined(given_source: LabelledSource, shift: int = 0, **config: Any) -> MinedTuples:
    pools = config.pop("pools", [{"scorer": "a", "ranks": [1, 20], "take": 5}])
    settings_ = Mining.model_validate({"source": "numbers", "pools": pools, **config})
    scorers = {"a": ByDistance(given_source, shift), "b": ByDistance(given_source, 10)}
    return mine(given_source, settings_, scorers)


def rows(found: MinedTuples, given_source: LabelledSource) -> dict[str, list[str]]:
    return {str(row["query_id"]): list(row["document_ids"]) for row in candidate_rows(given_source, found)}  # type: ignore[call-overload]


def test_a_tuple_is_the_best_positive_and_distinct_negatives_of_the_windows() -> None:
    given_source = source()
    pools = [{"scorer": "a", "ranks": [3, 20], "take": 5}, {"scorer": "b", "ranks": [1, 8], "take": 3}]
    found = mined(given_source, pools=pools)
    assert found.documents.shape == (30, 9)
    for query, documents in rows(found, given_source).items():
        number = int(query[1:])
        assert documents[0] == f"d{number + 1:02d}"
        assert len(set(documents)) == 9
        assert f"d{number:02d}" not in documents
        ranked = [d for d, _ in ByDistance(given_source).search([query], 20)[0]]
        assert set(documents[1:6]) <= set(ranked[2:20])
        below = [d for d, _ in ByDistance(given_source, 10).search([query], 8)[0]]
        assert set(documents[6:]) <= set(below)
    assert found.counts.extended == found.counts.random == 0
    # Sampling, not the first ones of the window.
    assert (
        len({tuple(int(d[1:]) - int(q[1:]) for d in row) for q, row in rows(found, given_source).items()})
        > 20
    )


def test_a_tuple_depends_on_its_own_query_and_the_seed_alone() -> None:
    whole, backwards = source(), source(order=-1)
    base = rows(mined(whole), whole)
    assert rows(mined(backwards), backwards) == base
    few = rows(mined(whole, max_queries=7), whole)
    assert len(few) == 7
    assert all(base[query] == documents for query, documents in few.items())
    assert set(rows(mined(backwards, max_queries=7), backwards)) == set(few)
    other = rows(mined(whole, seed=1), whole)
    assert other != base
    assert list(other) != list(base) and set(other) == set(base)


def test_an_exhausted_window_is_extended_and_counted() -> None:
    given_source = source(queries=5)
    found = mined(given_source, pools=[{"scorer": "a", "ranks": [1, 4], "take": 5}])
    for query, documents in rows(found, given_source).items():
        # Both positives are in the window of four; the rest comes from just below it.
        ranked = [d for d, _ in ByDistance(given_source).search([query], 7)[0]]
        assert set(documents) | {f"d{int(query[1:]):02d}"} == set(ranked)
    assert found.counts.extended == 5 * 3


def test_the_margin_drops_false_negatives() -> None:
    given_source = source(queries=5)
    found = mined(given_source, shift=1, false_negative_margin=0.95)
    # The positive scores 100, so distances below 5 are too close.
    for query, documents in rows(found, given_source).items():
        assert all(abs(int(d[1:]) - int(query[1:]) - 1) >= 5 for d in documents[1:])
    assert found.counts.false_negatives > 0
    # Far documents are left; a margin that bars all of them is an error, not a shorter tuple.
    with pytest.raises(DataError, match="false_negative_margin leaves pool 'a' 0 of the 5"):
        mined(given_source, shift=1, false_negative_margin=0.01)


def test_a_used_up_ranking_goes_on_with_random_documents() -> None:
    class Short(ByDistance):
        def search(self, query_ids: Sequence[str], depth: int) -> Ranking:
            return super().search(query_ids, 3)

    given_source = source(queries=5)
    config = Mining.model_validate({"source": "n", "pools": [{"scorer": "a", "ranks": [1, 9], "take": 8}]})
    found = mine(given_source, config, {"a": Short(given_source)})
    assert all(len(set(documents)) == 9 for documents in rows(found, given_source).values())
    assert found.counts.random == 5 * 8 - 5


def test_a_corpus_smaller_than_a_tuple_is_refused() -> None:
    small = source(queries=3, documents=6)
    assert mined(small, pools=[{"scorer": "a", "take": 4}]).documents.shape == (3, 5)
    with pytest.raises(DataError, match="has 6 documents: too few for tuples of 6 when a query has 2 pos"):
        mined(small, pools=[{"scorer": "a", "take": 5}])


@settings(max_examples=40, deadline=None)
@given(data=st.data(), size=st.integers(2, 5))
def test_chaining_is_a_permutation_that_takes_the_most_shared_tuple(data: st.DataObject, size: int) -> None:
    tuples = data.draw(st.lists(st.sets(st.integers(0, 12), min_size=3, max_size=3), min_size=1, max_size=14))
    documents = np.asarray([sorted(row) for row in tuples], dtype=np.int32)
    order = chain_groups(documents, 13, size).tolist()
    assert sorted(order) == list(range(len(tuples)))
    # Greedy, by definition.
    left = list(range(len(tuples)))
    expected: list[int] = []
    while left:
        group = [left.pop(0)]
        while left and len(group) < size:
            seen = set().union(*(tuples[i] for i in group))
            best = max(left, key=lambda i: (len(tuples[i] & seen), -i))
            left.remove(best)
            group.append(best)
        expected += group
    assert order == expected


def test_groups_share_documents() -> None:
    given_source = source()

    def distinct(found: MinedTuples) -> int:
        return sum(len(set(found.documents[i : i + 5].ravel().tolist())) for i in range(0, 30, 5))

    plain, grouped = mined(given_source), mined(given_source, group_size=5)
    assert rows(plain, given_source) == rows(grouped, given_source)
    assert distinct(grouped) < 0.8 * distinct(plain)
