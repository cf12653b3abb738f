"""Scorers against their definitions: BM25's formula, labels, min-max means, ensembles."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cluster.config import Bm25Scorer
from cluster.registry import Registry
from cluster.scorers import (
    Candidates,
    Ensemble,
    build_ensemble,
    build_scorer,
    combine,
    minmax,
)
from cluster.scorers import Scorer as ScorerBase
from cluster.sources import LabelledSource
from colbert_core.errors import ConfigError, DataError, NonFiniteError
from tests.tiny_data import data_recipe
from tests.tiny_scorers import CORPUS, QUERIES, SOURCE, build


def bm25_by_formula(query: str, k1: float, b: float) -> dict[str, float]:
    """Lucene's BM25, term by term."""
    texts = {name: text.split() for name, text in CORPUS.items()}
    average = sum(map(len, texts.values())) / len(texts)
    scores = {}
    for name, words in texts.items():
        counts, total = Counter(words), 0.0
        for term in query.split():
            df = sum(term in other for other in texts.values())
            idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            tf = counts[term]
            total += idf * tf / (tf + k1 * (1 - b + b * len(words) / average))
        scores[name] = total
    return scores


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75)])
def test_bm25_is_the_formula(tmp_path: Path, k1: float, b: float) -> None:
    scorer = build(Bm25Scorer(kind="bm25", tokenizer="whitespace", k1=k1, b=b), tmp_path)
    ids = list(CORPUS)
    for query, row in zip(QUERIES, scorer.score(list(QUERIES), [ids] * 3), strict=True):
        expected = bm25_by_formula(QUERIES[query], k1, b)
        np.testing.assert_allclose(row, [expected[i] for i in ids], rtol=1e-5)
        assert row.dtype == np.float32
    assert not scorer.score(["q3"], [ids])[0].any()


def test_bm25_search_orders_ties_by_id_and_equals_its_scores(tmp_path: Path) -> None:
    scorer = build(Bm25Scorer(kind="bm25", tokenizer="whitespace"), tmp_path)
    ranking = scorer.search(["q2", "q3", "q1"], 3)
    # d0 and d9 are the same text; of the rest, which scores 0, the first ids follow.
    assert [document for document, _ in ranking[0]] == ["d0", "d9", "d1"]
    assert [document for document, _ in ranking[1]] == ["d0", "d1", "d2"]
    assert ranking[2][0][0] == "d1"
    scores = scorer.score(["q2"], [["d0", "d9", "d1"]])[0]
    assert [score for _, score in ranking[0]] == scores.tolist()


def test_bm25_reads_japanese_words_width_and_case(tmp_path: Path) -> None:
    corpus = {"a": "日本の首都は東京である。", "b": "ＤＯＧは犬のことである。", "c": "京都の大学"}
    source = LabelledSource("ja", corpus, {"1": "東京", "2": "dog", "3": "都"}, {"1": {"a": 1}})
    scorer = build(Bm25Scorer(kind="bm25"), tmp_path, source)
    scores = scorer.score(["1", "2", "3"], [["a", "b", "c"]] * 3)
    # 東京 is a word of a only, and no part of it matches 京都; full-width letters are folded.
    assert scores[0][0] > 0 == scores[0][1] == scores[0][2]
    assert scores[1][1] > 0 == scores[1][0]
    assert not scores[2].any()


def test_unknown_ids_are_errors_that_name_them(tmp_path: Path) -> None:
    scorer = build(Bm25Scorer(kind="bm25", tokenizer="whitespace"), tmp_path)
    with pytest.raises(DataError, match="no document 'nope', a candidate of query 'q1'"):
        scorer.score(["q1"], [["d1", "nope"]])
    with pytest.raises(DataError, match="no query 'q7'"):
        scorer.search(["q7"], 1)
    foreign = Candidates(["q1"], ["cat"], [["nope"]], [["text"]])
    with pytest.raises(DataError, match="no document 'nope'"):
        scorer.checked(foreign)


class Fixed(ScorerBase):
    """Scores from a table; it cannot search."""

    def __init__(self, table: dict[str, float]) -> None:
        super().__init__("fixed", SOURCE)
        self.table = table

    def score_candidates(self, candidates: Candidates) -> list[NDArray[np.float32]]:
        return [
            np.asarray([self.table[document] for document in ids], dtype=np.float32)
            for ids in candidates.document_ids
        ]


def test_minmax_and_the_weighted_mean() -> None:
    assert minmax(np.asarray([3.0, 1.0, 2.0], dtype=np.float32)).tolist() == [1.0, 0.0, 0.5]
    assert minmax(np.asarray([7.0, 7.0], dtype=np.float32)).tolist() == [0.0, 0.0]
    assert len(minmax(np.zeros(0, dtype=np.float32))) == 0
    rows = {
        "a": [np.asarray([0.0, 10.0, 5.0], dtype=np.float32)],
        "b": [np.asarray([-1.0, -3.0, -1.0], dtype=np.float32)],
        "flat": [np.asarray([4.0, 4.0, 4.0], dtype=np.float32)],
    }
    combined = combine(rows, {"a": 1.0, "b": 2.0, "flat": 1.0})[0]
    np.testing.assert_allclose(combined, [(0 + 2) / 4, (1 + 0) / 4, (0.5 + 2) / 4])


def test_an_ensemble_searches_the_union_and_scores_it_with_all(tmp_path: Path) -> None:
    bm25 = build(Bm25Scorer(kind="bm25", tokenizer="whitespace"), tmp_path)
    table = {"d0": 0.0, "d1": 1.0, "d2": 9.0, "d5": 5.0, "d9": 2.0}
    ensemble = Ensemble("both", SOURCE, {"bm25": (bm25, 1.0), "fixed": (Fixed(table), 3.0)})
    # BM25 alone finds d0 and d9, and gives them the same score: the other member decides.
    assert [document for document, _ in ensemble.search(["q2"], 2)[0]] == ["d9", "d0"]
    alone = Ensemble("one", SOURCE, {"fixed": (Fixed(table), 3.0)})
    assert alone.score(["q1"], [["d2", "d5"]])[0].tolist() == [9.0, 5.0]
    with pytest.raises(ConfigError, match="none of its scorers can search"):
        alone.search(["q1"], 1)


def test_labels_are_a_teacher_and_need_a_source(tmp_path: Path) -> None:
    recipe = data_recipe(
        tmp_path, scorers={"people": {"kind": "labels"}, "words": {"kind": "bm25", "tokenizer": "whitespace"}}
    )
    registry = Registry.open(recipe.storage)
    people = build_scorer(recipe, "people", SOURCE, registry)
    assert people.score(["q2", "q3"], [["d0", "d9"], ["d0"]])[0].tolist() == [0.0, 1.0]
    with pytest.raises(ConfigError, match="cannot search"):
        people.search(["q1"], 1)
    both = build_ensemble(recipe, "both", {"people": 1.0, "words": 1.0}, SOURCE, registry)
    assert [document for document, _ in both.search(["q2"], 2)[0]] == ["d9", "d0"]
    for name in ("people", "words"):
        with pytest.raises(ConfigError, match=f"scorer '{name}' needs a labelled data source"):
            build_scorer(recipe, name, None, registry)


def test_a_score_that_is_no_number_is_an_error_with_its_pair() -> None:
    broken = Fixed({"d1": 1.0, "d2": math.nan})
    with pytest.raises(NonFiniteError, match="scorer 'fixed' gives nan for query 'q1', document 'd2'"):
        broken.score(["q1"], [["d1", "d2"]])
