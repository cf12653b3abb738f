"""Exact late interaction: for each query vector the largest dot product with a document, summed.

Padding never takes part: a padded cell counts as minus infinity, so a document whose best similarity is
negative keeps it, and a document without any vector scores minus infinity. All scores are fp32, whatever
the autocast state.

The differentiable functions look for the best document vector without gradients, then compute only the
chosen dot products with them. The gradient is that of the maximum, and neither the similarities nor
their gradients are kept: 16 queries of 32 vectors against 8 documents of 120 each take 20 ms forward and
backward on one core, against 52 ms through a padded maximum and 74 ms through ``scatter_reduce``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from colbert_core.errors import DimensionError
from colbert_core.threads import on_threads
from colbert_core.vectors import RaggedVectors

# Most numbers of one intermediate block: what stays in a CPU's cache, and what fills a GPU.
_BLOCK_CPU = 1 << 20
_BLOCK_GPU = 1 << 25
_FEWEST_ROWS = 1024  # document vectors that are worth a thread's while
_CONVERTED_ROWS = 1 << 16  # document vectors converted to fp32 at a time


def maxsim_padded(
    queries: Tensor, documents: Tensor, document_mask: Tensor, query_mask: Tensor | None = None
) -> Tensor:
    """Scores of each query against its own n documents, differentiable.

    Args:
        queries: float ``[batch, query length, dim]``.
        documents: float ``[batch, n, document length, dim]``.
        document_mask: bool ``[batch, n, document length]``, true for real vectors.
        query_mask: bool ``[batch, query length]``; default: all vectors are real.

    Returns:
        fp32 ``[batch, n]``.

    Raises:
        DimensionError: the shapes do not fit together.
    """
    fits = (
        queries.ndim == 3
        and documents.ndim == 4
        and (queries.shape[0], queries.shape[2]) == (documents.shape[0], documents.shape[3])
        and document_mask.shape == documents.shape[:3]
        and (query_mask is None or query_mask.shape == queries.shape[:2])
    )
    if not fits:
        raise DimensionError(
            f"queries {list(queries.shape)}, documents {list(documents.shape)}, document_mask "
            f"{list(document_mask.shape)}: expected [batch, query length, dim], [batch, n, document length, "
            "dim], [batch, n, document length]"
        )
    batch, n, length, dim = documents.shape
    keep = queries.new_ones(queries.shape[:2], dtype=torch.bool) if query_mask is None else query_mask
    own = torch.arange(batch * n, device=queries.device)
    rows = torch.arange(batch * n * length, device=queries.device).view(batch * n, length)
    return _pair_scores(
        queries, keep, documents.reshape(-1, dim), rows, document_mask.reshape(-1, length), own // n, own
    ).view(batch, n)


def maxsim_pairs(queries: RaggedVectors, documents: RaggedVectors, pairs: Tensor) -> Tensor:
    """Scores of chosen (query, document) pairs, differentiable.

    Queries may have different numbers of documents, and documents may be shared between queries: each is
    encoded once and its gradients add up.

    Args:
        queries: vectors of the queries.
        documents: vectors of the documents, on the same device.
        pairs: int64 ``[P, 2]``: query number, document number.

    Returns:
        fp32 ``[P]``.

    Raises:
        DimensionError: the dimensions differ, or a pair names a query or document that is not there.
    """
    _same_dim(queries.dim, documents.dim)
    pairs = pairs.cpu()
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise DimensionError(f"pairs must be [P, 2], not {list(pairs.shape)}")
    for column, (name, count) in enumerate((("query", len(queries)), ("document", len(documents)))):
        outside = (pairs[:, column] < 0) | (pairs[:, column] >= count)
        if outside.any():
            bad = int(outside.nonzero()[0])
            raise DimensionError(f"pair {bad} names {name} {int(pairs[bad, column])} of {count}")
    # Documents of similar length share a block, so that little of it is padding.
    order = torch.argsort(documents.lengths[pairs[:, 1]], stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    device = documents.vectors.device
    # Of many queries, a block of documents may concern a few.
    named, query_of = torch.unique(pairs[order, 0], return_inverse=True)
    padded, keep = queries.padded(named.to(device))
    rows, mask = documents.rows()
    document_of = pairs[order, 1].to(device)
    scores = _pair_scores(padded, keep, documents.vectors, rows, mask, query_of.to(device), document_of)
    return scores[place.to(device)]


def maxsim_ragged(query: Tensor, documents: RaggedVectors) -> Tensor:
    """Scores of one query ``[query length, dim]`` against all documents: fp32 ``[n]``, without gradients."""
    lengths = torch.tensor([query.shape[0]])
    return maxsim_matrix(RaggedVectors(query, lengths), documents)[0]


@torch.no_grad()
def maxsim_matrix(queries: RaggedVectors, documents: RaggedVectors) -> Tensor:
    """Scores of all queries against all documents, without gradients.

    Documents are taken in blocks, so that beside the result only a block of maxima is held on a CPU, of
    similarities on a GPU (at least one document against all query vectors).

    Returns:
        fp32 ``[queries, documents]``.
    """
    _same_dim(queries.dim, documents.dim)
    device = documents.vectors.device
    scores = torch.empty(len(queries), len(documents), device=device)
    scored = _cpu_blocks if device.type == "cpu" else _torch_blocks
    with _full_precision(device):
        for begin, end, block in scored(queries, documents):
            scores[:, begin:end] = block
    return scores.masked_fill_((documents.lengths == 0).to(device), -torch.inf)


def _torch_blocks(queries: RaggedVectors, documents: RaggedVectors) -> Iterator[tuple[int, int, Tensor]]:
    """Runs of documents, and their scores fp32 ``[queries, n]``."""
    device = documents.vectors.device
    right = queries.vectors.float().to(device).T
    columns, per_query = right.shape[1], queries.lengths.tolist()
    if not per_query:
        return
    for begin, end in _blocks(documents, max(1, _block(device) // max(1, columns)), len(documents)):
        first, last = int(documents.offsets[begin]), int(documents.offsets[end])
        similarity = documents.vectors[first:last].float() @ right
        owner = torch.repeat_interleave(
            torch.arange(end - begin, device=device), documents.lengths[begin:end].to(device)
        )
        best = similarity.new_full((end - begin, columns), -torch.inf)
        best.scatter_reduce_(0, owner[:, None].expand_as(similarity), similarity, "amax")
        yield begin, end, torch.stack([part.sum(dim=1) for part in best.split(per_query, dim=1)])


def _cpu_blocks(queries: RaggedVectors, documents: RaggedVectors) -> Iterator[tuple[int, int, Tensor]]:
    """As :func:`_torch_blocks`, by a compiled kernel on as many threads as torch has.

    What else there is to do is left to numpy: torch would wake its own threads for it, which then keep the
    cores of ours busy with waiting.
    """
    # What trains or only encodes does without numba.
    from colbert_core.maxsim_kernels import document_maxima
    from colbert_core.vector_code import COLUMNS

    columns, threads = len(queries.vectors), torch.get_num_threads()
    width = -(-columns // COLUMNS) * COLUMNS
    # torch's memory begins at a cache line, numpy's need not, and vectors across two lines are slow to load.
    padded = torch.zeros(queries.dim, width)
    padded[:, :columns] = queries.vectors.T
    vectors = documents.vectors
    as_is = vectors.dtype == torch.float32 and vectors.is_contiguous()
    most = len(vectors) if as_is else _CONVERTED_ROWS
    bounds = queries.offsets.tolist()
    for begin, end in _blocks(documents, max(1, most), max(1, _BLOCK_CPU // max(1, width))):
        first, last = int(documents.offsets[begin]), int(documents.offsets[end])
        rows = vectors[first:last].float().contiguous().numpy()
        offsets = documents.offsets[begin : end + 1].numpy() - first
        best = torch.empty(end - begin, width).numpy()
        best.fill(-np.inf)
        size = max(_FEWEST_ROWS, len(rows) // (16 * threads))
        places = np.searchsorted(offsets, np.arange(size, len(rows), size))
        cuts = sorted({0, *places.tolist(), end - begin})
        parts = [(rows, offsets, i, j, padded.numpy(), best) for i, j in pairwise(cuts)]
        on_threads(document_maxima, parts, threads)
        block = np.empty((len(queries), end - begin), dtype=np.float32)
        for row, (left, right) in zip(block, pairwise(bounds), strict=True):
            best[:, left:right].sum(axis=1, out=row)
        yield begin, end, torch.from_numpy(block)


def _pair_scores(
    queries: Tensor,
    query_mask: Tensor,
    vectors: Tensor,
    rows: Tensor,
    mask: Tensor,
    query_of: Tensor,
    document_of: Tensor,
) -> Tensor:
    """``queries`` are padded ``[Q, Lq, dim]``; documents are ``rows`` ``[D, Ld]`` of ``vectors``."""
    if not mask.any():
        return queries.new_full((len(query_of),), -torch.inf, dtype=torch.float32)
    with _full_precision(vectors.device):
        best = _best_rows(queries.detach(), vectors.detach(), rows, mask, query_of, document_of)
        products = queries[query_of].float() * vectors[best].float()
        similarity = products.sum(dim=-1).masked_fill(~query_mask[query_of], 0.0)
        return similarity.sum(dim=-1).masked_fill(~mask.any(dim=1)[document_of], -torch.inf)


@torch.no_grad()
def _best_rows(
    queries: Tensor, vectors: Tensor, rows: Tensor, mask: Tensor, query_of: Tensor, document_of: Tensor
) -> Tensor:
    """int64 ``[P, Lq]``: the row of ``vectors`` that is nearest to each query vector of each pair."""
    best = rows.new_empty(len(query_of), queries.shape[1])
    size = max(1, _block(rows.device) // max(1, rows.shape[1] * (queries.shape[1] + queries.shape[2])))
    for begin in range(0, len(query_of), size):
        chosen = document_of[begin : begin + size]
        real = mask[chosen]
        used = real.any(dim=0).nonzero()
        longest = int(used[-1]) + 1 if len(used) else 1
        real, where = real[:, :longest], rows[chosen, :longest]
        left = queries[query_of[begin : begin + size]].float()
        similarity = torch.bmm(left, vectors[where].float().transpose(1, 2))
        similarity.masked_fill_(~real[:, None], -torch.inf)
        best[begin : begin + size] = where.gather(1, similarity.argmax(dim=-1))
    return best


def _blocks(documents: RaggedVectors, most: int, count: int) -> Iterator[tuple[int, int]]:
    """Runs of at most ``count`` documents and ``most`` vectors; a longer document is a run of its own."""
    offsets = documents.offsets
    begin = 0
    while begin < len(documents):
        end = int(torch.searchsorted(offsets, int(offsets[begin]) + most, right=True)) - 1
        end = min(max(end, begin + 1), begin + count, len(documents))
        yield begin, end
        begin = end


def _block(device: torch.device) -> int:
    return _BLOCK_CPU if device.type == "cpu" else _BLOCK_GPU


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, enabled=False):
        yield


def _same_dim(query: int, document: int) -> None:
    if query != document:
        raise DimensionError(f"query vectors have {query} dimensions, document vectors {document}")
