"""What a scorer is: it scores (query, document) pairs, and most kinds also search a corpus."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.sources import LabelledSource
from colbert_core.errors import ConfigError, DataError, NonFiniteError
from colbert_core.exact import Ranking, TopDocuments

Scores = list[NDArray[np.float32]]


@dataclass(frozen=True)
class Candidates:
    """Queries and, for each, the documents to score.

    Attributes:
        query_ids: per query.
        queries: per query, its text.
        document_ids: per query, the ids of its documents.
        documents: per query, the texts of its documents, in the order of the ids.
    """

    query_ids: Sequence[str]
    queries: Sequence[str]
    document_ids: Sequence[Sequence[str]]
    documents: Sequence[Sequence[str]]

    @classmethod
    def of_source(
        cls, source: LabelledSource, query_ids: Sequence[str], document_ids: Sequence[Sequence[str]]
    ) -> Candidates:
        """Looks the texts up.

        Raises:
            DataError: the source lacks a query or a document; the message names the id.
        """
        return cls(
            query_ids,
            query_texts(source, query_ids),
            document_ids,
            [document_texts(source, row, query) for query, row in zip(query_ids, document_ids, strict=True)],
        )

    def __len__(self) -> int:
        return len(self.query_ids)


class Scorer(ABC):
    """Scores documents for queries; higher is more relevant.

    Attributes:
        name: the scorer's name in the recipe, for messages.
        source: the corpus, queries and labels it works on; None where the texts come with each call.
    """

    def __init__(self, name: str, source: LabelledSource | None) -> None:
        self.name = name
        self.source = source

    @abstractmethod
    def score_candidates(self, candidates: Candidates) -> Scores:
        """Scores given texts.

        Returns:
            Per query, float32 of one finite score per document.
        """

    def search(self, query_ids: Sequence[str], depth: int) -> Ranking:
        """The ``depth`` best documents of the source for each query, equal scores by document id.

        Raises:
            ConfigError: this kind of scorer cannot search.
        """
        raise ConfigError(
            f"scorer {self.name!r} cannot search a corpus, only score given documents; "
            "bm25, bi_encoder, token_maxsim and colbert can"
        )

    @property
    def can_search(self) -> bool:
        """Whether :meth:`search` is implemented."""
        return type(self).search is not Scorer.search

    def score(self, query_ids: Sequence[str], document_ids: Sequence[Sequence[str]]) -> Scores:
        """Scores documents of the source, see :meth:`score_candidates`.

        Raises:
            DataError: the source lacks an id.
            NonFiniteError: a score is NaN or infinite.
        """
        return self.checked(Candidates.of_source(self.require_source(), query_ids, document_ids))

    def checked(self, candidates: Candidates) -> Scores:
        """:meth:`score_candidates`, with its result checked.

        Raises:
            NonFiniteError: a score is NaN or infinite; the message names the query and the document.
        """
        scores = self.score_candidates(candidates)
        for query, ids, row in zip(candidates.query_ids, candidates.document_ids, scores, strict=True):
            bad = np.flatnonzero(~np.isfinite(row))
            if len(bad):
                raise NonFiniteError(
                    f"scorer {self.name!r} gives {row[bad[0]]} for query {query!r}, document {ids[bad[0]]!r}"
                )
        return scores

    def require_source(self) -> LabelledSource:
        """The source.

        Raises:
            ConfigError: there is none.
        """
        if self.source is None:
            raise ConfigError(
                f"scorer {self.name!r} needs a labelled data source; tuples read from files have none"
            )
        return self.source

    def statistics(self) -> dict[str, float]:
        """Counts so far that a report should show, such as truncated texts."""
        return {}


class Ensemble(Scorer):
    """Several scorers as one: each min-max normalised over a query's documents, then the weighted mean.

    A member that gives all documents of a query the same score has no opinion and contributes 0. An
    ensemble of one scorer gives that scorer's own scores.

    Attributes:
        members: scorer and weight by name.
    """

    def __init__(
        self, name: str, source: LabelledSource | None, members: Mapping[str, tuple[Scorer, float]]
    ) -> None:
        super().__init__(name, source)
        self.members = members

    def score_candidates(self, candidates: Candidates) -> Scores:
        scores = {name: scorer.checked(candidates) for name, (scorer, _) in self.members.items()}
        return self._combine(scores)

    def _combine(self, scores: Mapping[str, Scores]) -> Scores:
        if len(scores) == 1:
            return next(iter(scores.values()))
        return combine(scores, {name: weight for name, (_, weight) in self.members.items()})

    def search(self, query_ids: Sequence[str], depth: int) -> Ranking:
        """The union of what each member finds, scored by all members.

        Members that cannot search score what the others found.
        """
        source = self.require_source()
        searchers = {name: scorer for name, (scorer, _) in self.members.items() if scorer.can_search}
        if not searchers:
            raise ConfigError(f"ensemble {self.name!r}: none of its scorers can search a corpus")
        found: list[set[str]] = [set() for _ in query_ids]
        for scorer in searchers.values():
            for union, hits in zip(found, scorer.search(query_ids, depth), strict=True):
                union.update(document for document, _ in hits)
        union_ids = [sorted(union) for union in found]
        scores = self._combine(
            {name: scorer.score(query_ids, union_ids) for name, (scorer, _) in self.members.items()}
        )
        return rank(list(source.corpus), union_ids, scores, depth)

    def statistics(self) -> dict[str, float]:
        return {
            f"{name}/{key}": value
            for name, (scorer, _) in self.members.items()
            for key, value in scorer.statistics().items()
        }


def minmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores of one query brought to 0..1; all 0 where they are all equal (or there are none)."""
    if not len(scores):
        return scores
    low, high = scores.min(), scores.max()
    if high == low:
        return np.zeros_like(scores)
    return ((scores - low) / (high - low)).astype(np.float32)


def combine(scores: Mapping[str, Scores], weights: Mapping[str, float]) -> Scores:
    """Per query the weighted mean of the members' min-max normalised scores.

    Args:
        scores: by member, per query the scores of the same documents.
        weights: by member, above 0.
    """
    total = sum(weights[name] for name in scores)
    rows = zip(*scores.values(), strict=True)
    shares = [weights[name] / total for name in scores]
    return [
        np.sum([share * minmax(row) for share, row in zip(shares, members, strict=True)], axis=0).astype(
            np.float32
        )
        for members in rows
    ]


def rank(
    corpus_ids: Sequence[str], document_ids: Sequence[Sequence[str]], scores: Scores, depth: int
) -> Ranking:
    """Sorts scored documents of each query; see :class:`~colbert_core.exact.Ranking`."""
    place = {document: i for i, document in enumerate(corpus_ids)}
    top = TopDocuments(len(document_ids), corpus_ids, depth)
    for query, (ids, row) in enumerate(zip(document_ids, scores, strict=True)):
        positions = np.asarray([place[document] for document in ids], dtype=np.int64)
        top.merge_documents(query, positions[None], row[None])
    return top.ranking()


def query_texts(source: LabelledSource, query_ids: Iterable[str]) -> list[str]:
    """The texts of queries.

    Raises:
        DataError: the source has no such query.
    """
    try:
        return [source.queries[query] for query in query_ids]
    except KeyError as error:
        raise DataError(f"source {source.name!r} has no query {error.args[0]!r}") from None


def document_texts(source: LabelledSource, document_ids: Iterable[str], query_id: str) -> list[str]:
    """The texts of documents.

    Raises:
        DataError: the source has no such document; the message names it and the query.
    """
    try:
        return [source.corpus[document] for document in document_ids]
    except KeyError as error:
        raise DataError(
            f"source {source.name!r} has no document {error.args[0]!r}, a candidate of query {query_id!r}"
        ) from None
