"""Searching and scoring over Ray actors, with the results of one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from cluster.config import Recipe
from cluster.registry import Registry
from cluster.scorers.api import Candidates, Scorer, Scores
from cluster.scorers.build import build_scorer
from cluster.scorers.vectors import VectorScorer, share_cache
from cluster.sources import LabelledSource, load_source
from cluster.worker_pool import WorkerPool
from colbert_core.exact import Ranking, TopDocuments

# Shares of work per worker: enough to even out workers of different speed.
_SHARES = 4
_ENCODERS = ("bi_encoder", "token_maxsim", "colbert")


class ScorerWorkers(WorkerPool):
    """A pool of actors that hold the scorers of one source.

    Args:
        recipe: describes the scorers and the source.
        source: the source, loaded; each worker loads it again.
        workers: how many actors.
        cpus, gpus: what each of them takes.
    """

    def __init__(
        self, recipe: Recipe, source: LabelledSource, workers: int, cpus: float, gpus: float
    ) -> None:
        arguments = (recipe, source.name, max(1, int(cpus)), workers)
        super().__init__(_Worker, arguments, size=workers, cpus=cpus, gpus=gpus)
        self.source = source
        self.recipe = recipe
        self.count = workers


@dataclass(frozen=True)
class Search:
    """A worker's share of a search.

    Attributes:
        scorer: its name.
        depth: documents per query.
        first_query: place of the first of its queries.
        query_ids: reference to the ids of its queries.
        span: first and last (exclusive) position of its documents.
    """

    scorer: str
    depth: int
    first_query: int
    query_ids: Any
    span: tuple[int, int]


class DistributedScorer(Scorer):
    """A scorer whose work is shared by :class:`ScorerWorkers`.

    An encoder's workers each encode and search their part of the documents, so each document is encoded
    once; other scorers, which need the whole corpus, take their part of the queries.
    """

    def __init__(self, name: str, workers: ScorerWorkers) -> None:
        super().__init__(name, workers.source)
        self._workers = workers

    def score_candidates(self, candidates: Candidates) -> Scores:
        count = len(candidates)
        found: list[Any] = [None] * count
        shares = [
            (
                self.name,
                first,
                Candidates(
                    candidates.query_ids[first:last],
                    candidates.queries[first:last],
                    candidates.document_ids[first:last],
                    candidates.documents[first:last],
                ),
            )
            for first, last in self._spans(count)
        ]
        for _, (first, scores) in self._workers.map("score", shares, f"{self.name}: scoring"):
            found[first : first + len(scores)] = scores
        return found

    def search(self, query_ids: Sequence[str], depth: int) -> Ranking:
        corpus_ids = list(self.require_source().corpus)
        top = TopDocuments(len(query_ids), corpus_ids, depth)
        everything = ray.put(list(query_ids))
        if self._by_documents:
            spans = self._spans(len(corpus_ids))
            shares = [Search(self.name, depth, 0, everything, span) for span in spans]
        else:
            shares = [
                Search(self.name, depth, first, ray.put(list(query_ids[first:last])), (0, len(corpus_ids)))
                for first, last in self._spans(len(query_ids))
            ]
        for number, (positions, scores) in self._workers.map("search", shares, f"{self.name}: searching"):
            top.merge_documents(shares[number].first_query, positions, scores)
        return top.ranking()

    def statistics(self) -> dict[str, float]:
        found = self._workers.ask("statistics", self.name)
        # Workers that share the documents have each read all queries.
        names = found[0] if found else ()
        gather = {key: max if self._by_documents and "queries" in key else sum for key in names}
        return {key: float(of(row[key] for row in found)) for key, of in gather.items()}

    @property
    def _by_documents(self) -> bool:
        return self._workers.recipe.scorers[self.name].kind in _ENCODERS

    def _spans(self, count: int) -> list[tuple[int, int]]:
        cuts = np.linspace(0, count, min(count, self._workers.count * _SHARES) + 1).astype(int).tolist()
        return list(pairwise(cuts))


class _Worker:
    """One of several actors; it builds a scorer when it is first asked for it.

    One that takes a dead one's place knows nothing of before: all but its statistics comes out the same.
    """

    def __init__(self, recipe: Recipe, source_name: str, threads: int, workers: int) -> None:
        torch.set_num_threads(threads)
        share_cache(workers)
        self._recipe = recipe
        self._registry = Registry.open(recipe.storage)
        self._source = load_source(recipe, source_name)
        self._scorer = cache(self._build)

    def _build(self, name: str) -> Scorer:
        return build_scorer(self._recipe, name, self._source, self._registry)

    def score(self, task: tuple[str, int, Candidates]) -> tuple[int, Scores]:
        name, first, candidates = task
        return first, self._scorer(name).checked(candidates)

    def search(self, task: Search) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        scorer, query_ids = self._scorer(task.scorer), ray.get(task.query_ids)
        if isinstance(scorer, VectorScorer):
            ranking = scorer.search_span(query_ids, task.depth, *task.span)
        else:
            ranking = scorer.search(query_ids, task.depth)
        return ranking.positions, ranking.scores

    def statistics(self, name: str) -> dict[str, float]:
        return self._scorer(name).statistics()
