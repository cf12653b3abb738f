"""Exact MaxSim search over all documents: the reference that evaluation, mining and averaging share.

Documents come in blocks, so that a corpus never has to be in memory as vectors. A single-vector encoder
is the case of one vector per text, where MaxSim is the inner product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from colbert_core.errors import DimensionError, NonFiniteError
from colbert_core.vectors import RaggedVectors

# One matrix product covers this many document rows and query columns: its result (8 MB) stays in a
# core's cache until the maximum is taken, and is large enough for the product to run at full speed.
_DOCUMENT_ROWS = 1024
_QUERY_TOKENS = 2048
# Queries whose scores over a block are held at once.
_QUERY_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class Ranking(Sequence[list[tuple[str, float]]]):
    """The best documents of each query, best first, equal scores by document id.

    Behaves as a list of ``[(document id, score), ...]``, one per query.

    Attributes:
        document_ids: ids of the whole corpus.
        positions: int64 ``[queries, depth]``, positions in ``document_ids``; -1 where a query has fewer.
        scores: float32 ``[queries, depth]``; -inf where a query has fewer.
    """

    document_ids: Sequence[str]
    positions: NDArray[np.int64]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, query: int) -> list[tuple[str, float]]:  # type: ignore[override]
        row = self.positions[query]
        found = row >= 0
        return [
            (self.document_ids[i], float(score))
            for i, score in zip(row[found].tolist(), self.scores[query][found].tolist(), strict=True)
        ]

    def __iter__(self) -> Iterator[list[tuple[str, float]]]:
        return (self[query] for query in range(len(self)))


class TopDocuments:
    """The best documents of each query so far; blocks of scores are merged in.

    Args:
        queries: number of queries.
        document_ids: ids of the whole corpus, in the order that blocks count positions in.
        depth: documents kept per query.
    """

    def __init__(self, queries: int, document_ids: Sequence[str], depth: int) -> None:
        if depth < 1:
            raise DimensionError(f"depth must be at least 1, not {depth}")
        self._ids = document_ids
        self._depth = min(depth, len(document_ids))
        self._rank = np.empty(len(document_ids), dtype=np.int64)
        self._rank[sorted(range(len(document_ids)), key=document_ids.__getitem__)] = np.arange(
            len(document_ids)
        )
        self._index = np.full((queries, self._depth), -1, dtype=np.int64)
        self._scores = np.full((queries, self._depth), -np.inf, dtype=np.float32)

    def merge(self, first_query: int, first_document: int, scores: NDArray[np.float32]) -> None:
        """Takes the scores ``[queries, documents]`` of a block whose corner is at the given position.

        A score of -inf means that the document is not a result.
        """
        if not self._depth or not scores.size:
            return
        columns = np.arange(first_document, first_document + scores.shape[1])
        self._merge(first_query, np.broadcast_to(columns, scores.shape), scores)

    def merge_documents(
        self, first_query: int, documents: NDArray[np.int64], scores: NDArray[np.float32]
    ) -> None:
        """Takes scores ``[queries, n]`` of documents that are given by their positions ``[queries, n]``.

        The documents of one query are distinct and were not merged before.
        """
        if self._depth and scores.size:
            self._merge(first_query, documents, scores)

    def _merge(self, first_query: int, documents: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        rows = slice(first_query, first_query + len(scores))
        pool = np.concatenate([self._scores[rows], scores], axis=1)
        index = np.concatenate([self._index[rows], documents], axis=1)
        # Everything that reaches the depth-th best score, ties at the border included.
        border = -np.partition(-pool, self._depth - 1, axis=1)[:, self._depth - 1]
        row, column = np.nonzero((pool >= border[:, None]) & (pool > -np.inf))
        document, score = index[row, column], pool[row, column]
        order = np.lexsort((self._rank[document], -score, row))
        row, document, score = row[order], document[order], score[order]
        place = np.arange(len(row)) - np.searchsorted(row, row)
        keep = place < self._depth
        self._index[rows] = -1
        self._scores[rows] = -np.inf
        self._index[row[keep] + first_query, place[keep]] = document[keep]
        self._scores[row[keep] + first_query, place[keep]] = score[keep]

    def ranking(self) -> Ranking:
        return Ranking(self._ids, self._index, self._scores)


def exact_search(
    queries: RaggedVectors,
    document_ids: Sequence[str],
    blocks: Iterable[RaggedVectors],
    depth: int,
    *,
    span: tuple[int, int] | None = None,
) -> Ranking:
    """The ``depth`` documents of highest MaxSim for each query, none approximated or left out.

    Memory: the query vectors, one block, and ``depth`` results per query.

    Args:
        queries: fp32 token vectors of the queries.
        document_ids: ids of all documents.
        blocks: their token vectors in the same order, any number of documents at a time.
        depth: results per query.
        span: first and last (exclusive) position of the documents that the blocks hold; default: all.

    Raises:
        DimensionError: queries and documents differ in dimension, or ids and documents in number.
        NonFiniteError: a vector holds a NaN or an infinity.
    """
    top = TopDocuments(len(queries), document_ids, depth)
    start, end = span or (0, len(document_ids))
    begin = start
    for block in blocks:
        if begin + len(block) > end:
            raise DimensionError(f"more documents than the {end - start} ids")
        for first in range(0, len(queries), _QUERY_BLOCK):
            part = slice_texts(queries, first, min(first + _QUERY_BLOCK, len(queries)))
            top.merge(first, begin, exact_scores(part, block).cpu().numpy())
        begin += len(block)
    if begin != end:
        raise DimensionError(f"{end - start} ids, but {begin - start} documents")
    return top.ranking()


@torch.no_grad()
def exact_scores(queries: RaggedVectors, documents: RaggedVectors) -> Tensor:
    """MaxSim of every query with every document.

    Args:
        queries: fp32 ``[query tokens, dim]``, ragged.
        documents: fp32 ``[document tokens, dim]``, ragged.

    Returns:
        fp32 ``[queries, documents]``; -inf for a document without vectors.

    Raises:
        DimensionError: the dimensions differ.
        NonFiniteError: a vector holds a NaN or an infinity.
    """
    _check(queries, documents)
    device = documents.vectors.device
    scores = torch.full((len(queries), len(documents)), -torch.inf, device=device)
    groups = list(_query_groups(queries, device))
    # A buffer that is allocated anew for each product costs more in page faults than the product.
    product = torch.empty(0, device=device)
    best = torch.empty(0, device=device)
    for chosen, rows in _document_groups(documents):
        count, longest = rows.shape
        stacked = documents.vectors[rows.reshape(-1).to(device)]
        columns = chosen.to(device)
        for first, last, tokens, owner in groups:
            width = tokens.shape[1]
            if product.numel() < count * longest * width:
                product = torch.empty(count * longest * width, device=device)
            if best.numel() < count * width:
                best = torch.empty(count * width, device=device)
            table = product[: count * longest * width].view(count * longest, width)
            maxima = best[: count * width].view(count, width)
            torch.mm(stacked, tokens, out=table)
            torch.amax(table.view(count, longest, width), dim=1, out=maxima)
            total = maxima if owner is None else maxima @ owner
            scores[first:last, columns] = total.T
    return scores


def _check(queries: RaggedVectors, documents: RaggedVectors) -> None:
    if queries.dim != documents.dim:
        raise DimensionError(f"queries have {queries.dim} dimensions, documents {documents.dim}")
    for what, side in (("query", queries), ("document", documents)):
        if not torch.isfinite(side.vectors).all():
            raise NonFiniteError(f"a {what} vector holds a NaN or an infinity")


def slice_texts(texts: RaggedVectors, first: int, last: int) -> RaggedVectors:
    """Texts ``first`` to ``last`` (exclusive), as a view."""
    begin, end = int(texts.offsets[first]), int(texts.offsets[last])
    return RaggedVectors(texts.vectors[begin:end], texts.lengths[first:last])


def _query_groups(
    queries: RaggedVectors, device: torch.device
) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
    """Runs of queries of about as many tokens as one product takes.

    Yields:
        First and last query, their vectors ``[dim, tokens]``, and the 0/1 matrix ``[tokens, queries]``
        that sums over each query's tokens (None when each query has one).
    """
    offsets = queries.offsets
    first = 0
    while first < len(queries):
        last = int(torch.searchsorted(offsets, offsets[first] + _QUERY_TOKENS, right=True)) - 1
        last = min(max(last, first + 1), len(queries))
        lengths = queries.lengths[first:last]
        vectors = queries.vectors[int(offsets[first]) : int(offsets[last])].to(device)
        owner = None
        if not bool((lengths == 1).all()):
            owner = torch.zeros(len(vectors), last - first, device=device)
            owner[torch.arange(len(vectors)), torch.repeat_interleave(lengths)] = 1.0
        yield first, last, vectors.T.contiguous(), owner
        first = last


def _document_groups(documents: RaggedVectors) -> Iterator[tuple[Tensor, Tensor]]:
    """Documents of similar length, as rows of the flat vectors.

    A shorter document repeats its first vector up to the group's length, which leaves every maximum as
    it is and needs no mask.

    Yields:
        int64 ``[n]`` documents and int64 ``[n, longest]`` rows; documents without vectors in no group.
    """
    order = torch.argsort(documents.lengths, stable=True)
    order = order[documents.lengths[order] > 0]
    # Shortest first from the end: the group's last document is its longest.
    end = len(order)
    while end > 0:
        longest = int(documents.lengths[order[end - 1]])
        chosen = order[max(0, end - max(1, _DOCUMENT_ROWS // longest)) : end]
        starts = documents.offsets[chosen][:, None]
        position = torch.arange(longest)
        yield chosen, starts + torch.where(position < documents.lengths[chosen][:, None], position, 0)
        end -= len(chosen)
