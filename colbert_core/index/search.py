"""Search over the shards of an index.

The stages, all of whose cut-offs are over all shards at once:

1. the query's centroids: the best ``probes`` of each token;
2. gather: documents with a token in one of them, by the summed gains of their best ones;
3. interaction: the best ``candidates`` of those, by late interaction of centroids alone;
4. scores: the best ``rerank`` of those, from the compressed residuals; the best k are the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from colbert_core.config import SearchConfig
from colbert_core.errors import IndexFormatError, SearchError
from colbert_core.index.codec import Codec
from colbert_core.index.engine import CpuEngine, Engine, run_here
from colbert_core.index.filters import Filter, checked_filter, eligible_documents
from colbert_core.index.merge import (
    UNREACHED,
    Hit,
    PartialHits,
    could_be_shown,
    could_survive,
    takes_all,
    threshold,
)
from colbert_core.index.metadata import take_rows
from colbert_core.index.query import Query, Run, prepare_query
from colbert_core.index.shard import Shard, checked_ids
from colbert_core.index.stages import Candidates, Limits, Scope
from colbert_core.index.workers import Workers

_LEAST = np.iinfo(np.int64).min
# Documents of a single query are shared out between threads: handing out a piece costs as much as
# interacting with 10,000 tokens, and pieces differ in length.
_PIECE_TOKENS = 8192
_PIECES_PER_THREAD = 2


class Searcher:
    """Searches open shards that share one codec. Safe to call from several threads.

    A document's score is computed from integers in a fixed order, so it does not depend on the shard it
    is in, nor on the batch, the threads or the processor.

    Attributes:
        codec: the index's codec.
        shards: the open shards.
    """

    def __init__(
        self, codec: Codec, shards: Sequence[Shard], *, threads: int = 1, engine: Engine | None = None
    ) -> None:
        """Makes a searcher.

        Args:
            codec: the codec that all shards are encoded with.
            shards: at least one.
            threads: queries of a batch are searched side by side; the work on a single query is shared.
            engine: computes the stages; the CPU's by default.

        Raises:
            IndexFormatError: there is no shard, or one has another codec.
            SearchError: ``threads`` is below 1.
        """
        if not shards:
            raise IndexFormatError("an index has at least one shard")
        for shard in shards:
            if shard.manifest.codec_sha256 != codec.sha256:
                raise IndexFormatError(f"{shard.directory} is encoded with another codec")
        if threads < 1:
            raise SearchError(f"threads is {threads}; it must be at least 1")
        self.codec = codec
        self.shards = list(shards)
        self._engine: Engine = engine or CpuEngine(codec, self.shards)
        self._workers = Workers(threads)

    def __len__(self) -> int:
        """Documents that are not deleted."""
        return sum(int(np.count_nonzero(shard.live)) for shard in self.shards)

    def close(self) -> None:
        """Ends the threads."""
        self._workers.close()

    def search(
        self,
        queries: Sequence[ArrayLike],
        k: int,
        params: SearchConfig | None = None,
        filter: Filter | None = None,
    ) -> list[list[Hit]]:
        """Finds the best documents of each query.

        Args:
            queries: each floating ``[length, dim]``, at least one token.
            k: how many documents to return; all there are, if they are fewer.
            params: quality settings; ``rerank`` and ``candidates`` are raised to k where they are less.
            filter: ids allowed, or a condition on metadata. If no more than ``candidates`` documents
                pass, all of them are candidates, whatever the probes meet.

        Returns:
            For each query at most k hits, by descending score, ties by id.

        Raises:
            SearchError: k is below 1, a query has no tokens, or the filter cannot be applied.
            DimensionError: a query is no matrix of numbers, or has another dimension than the index.
            NonFiniteError: a query holds a NaN or an infinity.
        """
        prepared = self._prepared(queries, k)
        limits = Limits.of(params, k)
        scope = self._scope(filter)
        if scope.total == 0:
            return [[] for _ in prepared]
        return self._each(prepared, partial(self._search_one, limits=limits, scope=scope))

    def search_partial(
        self,
        queries: Sequence[ArrayLike],
        k: int,
        params: SearchConfig | None = None,
        filter: Filter | None = None,
    ) -> list[PartialHits]:
        """As :meth:`search`, where these shards are only some of the index's.

        Returns:
            For each query what :func:`merge_hits` needs to know from here.
        """
        prepared = self._prepared(queries, k)
        limits = Limits.of(params, k)
        scope = self._scope(filter)
        return self._each(prepared, partial(self._partial_one, limits=limits, scope=scope))

    def search_exact(
        self, queries: Sequence[ArrayLike], k: int, filter: Filter | None = None
    ) -> list[list[Hit]]:
        """The best of all documents by their scores: :meth:`search` without its approximations.

        Arguments, results and errors are those of :meth:`search`.
        """
        prepared = self._prepared(queries, k)
        scope = self._scope(filter)
        if scope.total == 0:
            return [[] for _ in prepared]
        documents = scope.documents()

        def one(query: Query, run: Run) -> list[Hit]:
            tables = self._engine.tables(query, 0, run)
            try:
                return self._best(documents, self._score(tables, documents, run), k)
            finally:
                self._engine.release(tables)

        return self._each(prepared, one)

    def score_documents(self, query: ArrayLike, ids: Sequence[str]) -> NDArray[np.float32]:
        """Scores float32 ``[n]`` of given documents.

        Raises:
            SearchError: an id is unknown or deleted; the message names it.
            DataError: an id is no string.
        """
        scores = self.score_known(query, ids)
        for name in ids:
            if name not in scores:
                raise SearchError(f"the index has no document {name!r}")
        return np.array([scores[name] for name in ids], dtype=np.float32)

    def score_known(self, query: ArrayLike, ids: Sequence[str]) -> dict[str, float]:
        """Scores of those of the given documents that these shards hold, by id."""
        (prepared,) = self._prepared([query], 1)
        names = list(dict.fromkeys(checked_ids(ids)))
        places = [self._live(shard, shard.find(names)) for shard in self.shards]
        documents = [place[place >= 0].astype(np.int32) for place in places]

        def one(query: Query, run: Run) -> dict[str, float]:
            tables = self._engine.tables(query, 0, run)
            try:
                scores = self._score(tables, documents, run)
            finally:
                self._engine.release(tables)
            return {
                names[i]: float(score)
                for place, found in zip(places, scores, strict=True)
                for i, score in zip(np.flatnonzero(place >= 0), found, strict=True)
            }

        return self._each([prepared], one)[0]

    def records(self, ids: Sequence[str], columns: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """Metadata of those of the given documents that these shards hold, by id.

        Args:
            ids: external ids.
            columns: which columns, as far as a shard has them; all if None.
        """
        names = list(dict.fromkeys(checked_ids(ids)))
        records: dict[str, dict[str, Any]] = {}
        for shard in self.shards:
            if shard.metadata is None:
                continue
            wanted = [name for name in shard.metadata.column_names if columns is None or name in columns]
            if not wanted:
                continue
            place = self._live(shard, shard.find(names))
            found = np.flatnonzero(place >= 0)
            rows = take_rows(shard.metadata.select(wanted), place[found]).to_pylist()
            records.update((names[i], row) for i, row in zip(found, rows, strict=True))
        return records

    def _search_one(self, query: Query, run: Run, limits: Limits, scope: Scope) -> list[Hit]:
        direct = scope.total <= limits.candidates
        tables = self._engine.tables(query, 0 if scope.total <= limits.rerank else limits.probes, run)
        try:
            if direct:
                found = self._everything(scope)
            else:
                found, reached = self._gather(tables, scope, limits, run)
                if takes_all(scope.total, reached, limits.candidates, limits.k):
                    found = self._everything(scope)
            if sum(map(len, found.documents)) > limits.rerank:
                self._interact(tables, found, run)
                floor = threshold(found.interaction, limits.rerank)
                found = found.only([keys >= floor for keys in found.interaction])
            return self._best(found.documents, self._score(tables, found.documents, run), limits.k)
        finally:
            self._engine.release(tables)

    def _partial_one(self, query: Query, run: Run, limits: Limits, scope: Scope) -> PartialHits:
        tables = self._engine.tables(query, limits.probes, run)
        try:
            found, reached = self._gather(tables, scope, limits, run)
            gathered = np.concatenate(found.gather)
            every = takes_all(scope.total, reached, limits.candidates, limits.k)
            if every:
                found = self._everything(scope, found)
            self._interact(tables, found, run)
            gather, interaction = np.concatenate(found.gather), np.concatenate(found.interaction)
            met = gather != UNREACHED
            second = np.zeros(len(gather), dtype=np.bool_)
            second[met] = could_survive(gather[met], interaction[met], limits.rerank)
            if every:
                second |= interaction >= threshold([interaction], limits.rerank)
            found = found.only(np.split(second, np.cumsum([len(d) for d in found.documents])[:-1]))
            gather, interaction, met = gather[second], interaction[second], met[second]
            scores = np.concatenate(self._score(tables, found.documents, run))
        finally:
            self._engine.release(tables)
        shown = np.zeros(len(gather), dtype=np.bool_)
        shown[met] = could_be_shown(gather[met], interaction[met], scores[met], limits.k)
        if every:
            shown |= could_be_shown(np.zeros_like(gather), interaction, scores, limits.k)
        names = [
            name
            for shard, documents, mask in zip(
                self.shards,
                found.documents,
                np.split(shown, np.cumsum([len(d) for d in found.documents])[:-1]),
                strict=True,
            )
            for name in shard.ids(documents[mask])
        ]
        return PartialHits(
            k=limits.k,
            candidates=limits.candidates,
            rerank=limits.rerank,
            eligible=scope.total,
            reached=reached,
            gather_keys=gathered,
            second_gather=gather,
            second_interaction=interaction,
            ids=names,
            scores=scores[shown],
            gather=gather[shown],
            interaction=interaction[shown],
        )

    def _gather(self, tables: Any, scope: Scope, limits: Limits, run: Run) -> tuple[Candidates, int]:
        """The best ``candidates`` of the documents that the probes meet, and how many they meet."""
        documents: list[NDArray[np.int32]] = [np.empty(0, np.int32)] * len(self.shards)
        keys: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * len(self.shards)

        def one(shard: int) -> None:
            documents[shard], keys[shard] = self._engine.gather(shard, tables, scope.eligible[shard])

        run([partial(one, shard) for shard in range(len(self.shards))])
        reached = sum(map(len, keys))
        floor = threshold(keys, limits.candidates)
        found = Candidates(documents, keys, [np.empty(0, np.int64) for _ in keys])
        masks = [key >= floor for key in keys]
        found.documents = [d[mask] for d, mask in zip(documents, masks, strict=True)]
        found.gather = [key[mask] for key, mask in zip(keys, masks, strict=True)]
        return found, reached

    def _everything(self, scope: Scope, met: Candidates | None = None) -> Candidates:
        """All eligible documents, with the keys of those that were met."""
        documents = scope.documents()
        gather = [np.full(len(some), UNREACHED, dtype=np.int64) for some in documents]
        if met is not None:
            for shard, some in enumerate(documents):
                gather[shard][np.searchsorted(some, met.documents[shard])] = met.gather[shard]
        return Candidates(documents, gather, [np.empty(0, np.int64) for _ in documents])

    def _interact(self, tables: Any, found: Candidates, run: Run) -> None:
        found.interaction = [np.empty(len(documents), np.int64) for documents in found.documents]

        def one(shard: int, piece: slice) -> None:
            found.interaction[shard][piece] = self._engine.interact(
                shard, tables, found.documents[shard][piece]
            )

        run([partial(one, shard, piece) for shard, piece in self._pieces(found.documents)])

    def _score(
        self, tables: Any, documents: Sequence[NDArray[np.int32]], run: Run
    ) -> list[NDArray[np.float32]]:
        scores = [np.empty(len(some), np.float32) for some in documents]

        def one(shard: int, piece: slice) -> None:
            scores[shard][piece] = self._engine.score(shard, tables, documents[shard][piece])

        run([partial(one, shard, piece) for shard, piece in self._pieces(documents)])
        return scores

    def _pieces(self, documents: Sequence[NDArray[np.int32]]) -> list[tuple[int, slice]]:
        """Parts of the documents: some for each thread, of about ``_PIECE_TOKENS`` tokens or more."""
        pieces = []
        share = sum(map(len, documents)) / (_PIECES_PER_THREAD * self._workers.threads)
        for shard, some in enumerate(documents):
            mean = self.shards[shard].manifest.tokens / max(1, len(self.shards[shard]))
            least = _PIECE_TOKENS / max(1.0, mean)
            step = math.ceil(max(1.0, share, least)) if self._workers.threads > 1 else max(1, len(some))
            pieces += [(shard, slice(start, start + step)) for start in range(0, len(some), step)]
        return pieces

    def _best(
        self, documents: Sequence[NDArray[np.int32]], scores: Sequence[NDArray[np.float32]], k: int
    ) -> list[Hit]:
        """The k best, ties by id."""
        together = np.concatenate(scores)
        floor = np.partition(together, len(together) - k)[len(together) - k] if len(together) > k else None
        hits: list[Hit] = []
        for shard, some, found in zip(self.shards, documents, scores, strict=True):
            mask = slice(None) if floor is None else found >= floor
            hits += map(Hit, shard.ids(some[mask]), found[mask].tolist())
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))[:k]

    def _prepared(self, queries: Sequence[ArrayLike], k: int) -> list[Query]:
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise SearchError(f"k is {k!r}; it must be a whole number of at least 1")
        return [prepare_query(self.codec, query, position) for position, query in enumerate(queries)]

    def _scope(self, condition: Filter | None) -> Scope:
        checked = checked_filter(condition)
        masks = [eligible_documents(shard, checked) for shard in self.shards]
        return Scope(masks, sum(int(np.count_nonzero(mask)) for mask in masks))

    @staticmethod
    def _live(shard: Shard, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Document numbers, with −1 for deleted ones too."""
        known = places >= 0
        places[known] = np.where(shard.live[places[known]], places[known], -1)
        return places

    def _each(self, queries: Sequence[Query], one: Callable[[Query, Run], Any]) -> list[Any]:
        """Answers queries: several side by side, a single one with its steps shared out."""
        if len(queries) == 1 and self._workers.threads > 1:
            return [one(queries[0], self._shared)]
        return self._workers.map([partial(one, query, run_here) for query in queries])

    def _shared(self, functions: Sequence[Callable[[], None]]) -> None:
        self._workers.map(functions)
