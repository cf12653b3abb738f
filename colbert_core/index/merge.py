"""Answers of groups of shards, and how they become the answer that one group of all shards gives.

A search cuts off three times: ``candidates`` documents by their gathered gains, ``rerank`` of those by the
interaction of centroids, ``k`` of those by their scores. The cut-offs are global, and a group that sees
only its own shards cannot know them. It does know that its part of the first cut is some prefix of its
own ranking, so it sends whatever any prefix could leave in the answer; :func:`merge_hits` then applies
the three cut-offs to what all groups sent. One exchange suffices, and the answer is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from colbert_core.errors import SearchError
from colbert_core.index.merge_kernels import best_of_prefixes, not_outranked

UNREACHED = -1  # first-stage key of a document that no probe met


class Hit(NamedTuple):
    """A document found."""

    id: str
    score: float


@dataclass(frozen=True)
class PartialHits:
    """What one group of shards answers to one query; plain arrays, cheap to send.

    Attributes:
        k, candidates, rerank: the cut-offs in force.
        eligible: documents that are neither deleted nor filtered out.
        reached: how many of them the probes met.
        gather_keys: int64, the best ``candidates`` first-stage keys.
        second_gather, second_interaction: int64 ``[m]``, both keys of the documents that the first
            cut-off could leave among the best ``rerank``.
        ids: those that the second cut-off, too, could leave among the best ``k``.
        scores: float32, their scores.
        gather, interaction: int64, their keys.
    """

    k: int
    candidates: int
    rerank: int
    eligible: int
    reached: int
    gather_keys: NDArray[np.int64]
    second_gather: NDArray[np.int64]
    second_interaction: NDArray[np.int64]
    ids: list[str]
    scores: NDArray[np.float32]
    gather: NDArray[np.int64]
    interaction: NDArray[np.int64]


def merge_hits(parts: Sequence[PartialHits], k: int | None = None) -> list[Hit]:
    """The answer to one query, from the answers of all groups.

    Args:
        parts: one a group, all to the same request.
        k: results wanted; by default, and at most, the request's.

    Returns:
        At most ``k`` hits, best first, ties by id: what one searcher over all shards returns.

    Raises:
        SearchError: the parts answer different requests, or k exceeds theirs.
    """
    if not parts:
        return []
    first = parts[0]
    if any((p.k, p.candidates, p.rerank) != (first.k, first.candidates, first.rerank) for p in parts):
        raise SearchError("the parts to merge answer requests with different settings")
    k = first.k if k is None else k
    if not 1 <= k <= first.k:
        raise SearchError(f"k is {k}; the parts hold the best {first.k}")
    eligible = sum(part.eligible for part in parts)
    reached = sum(part.reached for part in parts)
    if takes_all(eligible, reached, first.candidates, first.k):
        floor = np.int64(UNREACHED)
    else:
        floor = max(threshold([part.gather_keys for part in parts], first.candidates), np.int64(0))
    seconds = [part.second_interaction[part.second_gather >= floor] for part in parts]
    second_floor = threshold(seconds, first.rerank)
    hits = [
        Hit(part.ids[i], float(part.scores[i]))
        for part in parts
        for i in np.flatnonzero((part.gather >= floor) & (part.interaction >= second_floor))
    ]
    return sorted(hits, key=lambda hit: (-hit.score, hit.id))[:k]


def takes_all(eligible: int, reached: int, candidates: int, k: int) -> bool:
    """Whether every eligible document is a candidate.

    That is so where there are no more than candidates are wanted, and where the probes met too few
    documents to fill the answer.
    """
    return eligible <= candidates or reached < min(k, eligible)


def threshold(keys: Sequence[NDArray[np.int64]], keep: int) -> np.int64:
    """The ``keep``-th largest of all keys; the least integer if there are fewer.

    Keys end in a hash of the document's id. Where even that ties, all tied documents are kept: a cut-off
    that depends on nothing but keys is the same however documents are spread over shards.
    """
    together = np.concatenate([np.empty(0, dtype=np.int64), *keys])
    if len(together) <= keep:
        return np.int64(np.iinfo(np.int64).min)
    return np.partition(together, len(together) - keep)[len(together) - keep]


def could_survive(gather: NDArray[np.int64], interaction: NDArray[np.int64], keep: int) -> NDArray[np.bool_]:
    """Marks documents that some first cut-off leaves among the best ``keep`` of the second stage.

    Args:
        gather, interaction: int64 ``[n]``, the keys of both stages.
        keep: at least 1.
    """
    order = np.argsort(-gather, kind="stable")
    kept = np.empty(len(order), dtype=np.bool_)
    best_of_prefixes(gather[order], interaction[order], keep, kept)
    marked = np.empty(len(order), dtype=np.bool_)
    marked[order] = kept
    return marked


def could_be_shown(
    gather: NDArray[np.int64], interaction: NDArray[np.int64], scores: NDArray[np.float32], keep: int
) -> NDArray[np.bool_]:
    """Marks documents that some pair of cut-offs leaves among the best ``keep`` by score.

    Wherever a document survives, those survive that have no worse keys; if ``keep`` of them have better
    scores, it is not shown.

    Args:
        gather, interaction: int64 ``[n]``.
        scores: float32 ``[n]``.
        keep: at least 1.
    """
    kept = np.empty(len(gather), dtype=np.bool_)
    not_outranked(gather, interaction, scores, keep, kept)
    return kept
