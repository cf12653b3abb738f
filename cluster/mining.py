"""Hard negatives: one tuple per labelled query, its positive first, then documents that rankers confuse.

Everything is a pure function of the source, the settings and the seed: a tuple depends on its own query
alone, and not on how many queries are mined or in what order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cluster.config import Mining, Pool
from cluster.progress import progress
from cluster.scorers.api import Scorer
from cluster.sources import LabelledSource, stable_hash
from colbert_core.errors import DataError
from colbert_core.exact import Ranking

# Ranks searched below a pool's window, for what positives, other pools and the margin take out of it.
_SPARE_RANKS = 32


@dataclass
class MiningCounts:
    """What a report says about mining.

    Attributes:
        tuples: tuples made.
        extended: negatives from below a pool's window, which was used up.
        random: negatives drawn from the whole corpus, because the ranking was used up.
        false_negatives: candidates dropped for scoring too close to the positive.
    """

    tuples: int = 0
    extended: int = 0
    random: int = 0
    false_negatives: int = 0


@dataclass(frozen=True)
class MinedTuples:
    """Tuples as ids.

    Attributes:
        query_ids: per tuple.
        documents: int32 ``[tuples, nway]``, positions in the source's corpus, the positive first.
        counts: for the report.
    """

    query_ids: list[str]
    documents: NDArray[np.int32]
    counts: MiningCounts = field(default_factory=MiningCounts)


def mine(source: LabelledSource, config: Mining, scorers: Mapping[str, Scorer]) -> MinedTuples:
    """Mines a tuple for each labelled query.

    Of the documents labelled relevant, the one with the highest label is the positive (of equal ones,
    the first id); the others are never negatives. The pools are served in order, and no document is
    taken twice. Within a pool, ``take`` documents are sampled from its window of ranks; where fewer are
    left there, it goes on down the ranking, then to random documents of the corpus.

    Args:
        source: the labelled source.
        config: pools, margin, seed.
        scorers: by name, those that the pools name, over the same source.

    Returns:
        The tuples, in seeded random order, or in groups that share documents (``group_size``).

    Raises:
        DataError: the corpus has too few documents for a tuple.
    """
    query_ids = _chosen_queries(source, config)
    nway = 1 + sum(pool.take for pool in config.pools)
    corpus_ids = list(source.corpus)
    place = {document: i for i, document in enumerate(corpus_ids)}
    positives = [_by_label(source.qrels[query], place) for query in query_ids]
    most = max(len(row) for row in positives)
    if len(corpus_ids) < nway - 1 + most:
        raise DataError(
            f"source {source.name!r} has {len(corpus_ids)} documents: too few for tuples of {nway} when a "
            f"query has {most} positives"
        )
    counts = MiningCounts(tuples=len(query_ids))
    documents = np.full((len(query_ids), nway), -1, dtype=np.int32)
    documents[:, 0] = [row[0] for row in positives]
    column = 1
    for number, pool in enumerate(config.pools):
        depth = min(len(corpus_ids), pool.ranks[1] + nway + most + _SPARE_RANKS)
        scorer = scorers[pool.scorer]
        ranking = scorer.search(query_ids, depth)
        limits = _score_limits(scorer, query_ids, [corpus_ids[row[0]] for row in positives], config)
        with progress() as bar:
            for i, query in enumerate(bar.track(query_ids, description=f"{pool.scorer}: drawing negatives")):
                excluded = {*positives[i], *documents[i, 1:column].tolist()}
                random = np.random.default_rng([config.seed, number, stable_hash(query)])
                documents[i, column : column + pool.take] = _draw(
                    ranking, i, pool, excluded, float(limits[i]), random, counts
                )
        column += pool.take
    order = (
        np.arange(len(query_ids))
        if config.group_size is None
        else chain_groups(documents, len(corpus_ids), config.group_size)
    )
    return MinedTuples([query_ids[i] for i in order], documents[order], counts)


def candidate_rows(source: LabelledSource, mined: MinedTuples) -> Iterator[dict[str, object]]:
    """The tuples with their texts: ``query_id``, ``query``, ``document_ids``, ``documents``."""
    ids, texts = list(source.corpus), list(source.corpus.values())
    for query, row in zip(mined.query_ids, mined.documents.tolist(), strict=True):
        yield {
            "query_id": query,
            "query": source.queries[query],
            "document_ids": [ids[i] for i in row],
            "documents": [texts[i] for i in row],
        }


def chain_groups(documents: NDArray[np.int32], corpus_size: int, group_size: int) -> NDArray[np.int64]:
    """An order of tuples in which each group of ``group_size`` shares many documents.

    Greedy: a group starts with the first tuple that is left and takes the one that shares most documents
    with the group so far (the earlier of equals), until it is full.

    Args:
        documents: ``[tuples, nway]`` document numbers below ``corpus_size``.
        corpus_size: documents of the corpus.
        group_size: tuples of a group.

    Returns:
        ``[tuples]``, a permutation.
    """
    flat = documents.reshape(-1)
    # The inverted index: the tuples of document d are owners[starts[d] : starts[d + 1]].
    owners = (np.argsort(flat, kind="stable") // documents.shape[1]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=corpus_size))]).astype(np.int64)
    return _chain(documents, owners, starts, group_size)


@njit(cache=True)
def _chain(
    documents: NDArray[np.int32], owners: NDArray[np.int64], starts: NDArray[np.int64], group_size: int
) -> NDArray[np.int64]:
    tuples = len(documents)
    order = np.empty(tuples, dtype=np.int64)
    used = np.zeros(tuples, dtype=np.bool_)
    shared = np.zeros(tuples, dtype=np.int32)
    touched = np.empty(tuples, dtype=np.int64)
    in_group = np.zeros(len(starts) - 1, dtype=np.bool_)
    filled, first_left = 0, 0
    while filled < tuples:
        group_begin, touched_count = filled, 0
        while filled < tuples and filled - group_begin < group_size:
            best, most = -1, 0
            for position in range(touched_count):
                candidate = touched[position]
                if used[candidate]:
                    continue
                count = shared[candidate]
                if count > most or (count == most and candidate < best):
                    best, most = candidate, count
            if best < 0:
                while used[first_left]:
                    first_left += 1
                best = first_left
            used[best] = True
            order[filled] = best
            filled += 1
            for document in documents[best]:
                if in_group[document]:
                    continue
                in_group[document] = True
                for owner in owners[starts[document] : starts[document + 1]]:
                    if used[owner]:
                        continue
                    if shared[owner] == 0:
                        touched[touched_count] = owner
                        touched_count += 1
                    shared[owner] += 1
        for position in range(touched_count):
            shared[touched[position]] = 0
        for position in range(group_begin, filled):
            for document in documents[order[position]]:
                in_group[document] = False
    return order


def _chosen_queries(source: LabelledSource, config: Mining) -> list[str]:
    """The labelled queries in seeded random order, which does not depend on the file's; maybe a sample."""
    queries = sorted(source.labelled_queries, key=lambda query: (stable_hash(query, config.seed), query))
    return queries[: config.max_queries]


def _by_label(labels: Mapping[str, int], place: Mapping[str, int]) -> list[int]:
    """Positions of the relevant documents, highest label first, equal ones by id."""
    return [
        place[document] for document in sorted(labels, key=lambda document: (-labels[document], document))
    ]


def _score_limits(
    scorer: Scorer, query_ids: Sequence[str], positive_ids: Sequence[str], config: Mining
) -> NDArray[np.float32]:
    """Per query the score above which a candidate counts as a false negative; inf where none does.

    The margin is a share of the positive's score, so it says nothing where that is not above 0.
    """
    limits = np.full(len(query_ids), np.inf, dtype=np.float32)
    if config.false_negative_margin is not None:
        scores = np.concatenate(scorer.score(query_ids, [[document] for document in positive_ids]))
        limits[scores > 0] = config.false_negative_margin * scores[scores > 0]
    return limits


def _draw(
    ranking: Ranking,
    query: int,
    pool: Pool,
    excluded: set[int],
    limit: float,
    random: np.random.Generator,
    counts: MiningCounts,
) -> list[int]:
    """``pool.take`` documents for one query, by their positions in the corpus."""
    first, last = pool.ranks
    window: list[int] = []
    below: list[int] = []
    close: set[int] = set()
    for rank, (document, score) in enumerate(
        zip(ranking.positions[query].tolist(), ranking.scores[query].tolist(), strict=True), start=1
    ):
        if rank < first or document < 0 or document in excluded:
            continue
        if score > limit:
            counts.false_negatives += rank <= last
            close.add(document)
            continue
        (window if rank <= last else below).append(document)
    take = pool.take
    if len(window) >= take:
        return [window[i] for i in random.choice(len(window), take, replace=False)]
    extension = below[: take - len(window)]
    counts.extended += len(extension)
    taken = window + extension
    missing = take - len(taken)
    counts.random += missing
    barred = excluded | close | set(taken)
    if missing > len(ranking.document_ids) - len(barred):
        raise DataError(
            f"too few documents: false_negative_margin leaves pool {pool.scorer!r} "
            f"{len(taken)} of the {take} negatives of a query"
        )
    while missing:
        document = int(random.integers(len(ranking.document_ids)))
        if document not in barred:
            barred.add(document)
            taken.append(document)
            missing -= 1
    return taken
