"""Search and rerank as a front does them: check, encode, ask the groups, merge."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch

from cluster.config import ServeConfig
from colbert_core.errors import SearchError
from colbert_core.index import merge_hits
from colbert_core.maxsim import maxsim_ragged
from colbert_core.vectors import RaggedVectors
from serving.batcher import MicroBatcher
from serving.errors import UnknownDocument
from serving.metrics import Metrics
from serving.protocol import (
    GroupHits,
    GroupQuery,
    Health,
    RankedText,
    RerankRequest,
    RerankResponse,
    Result,
    SearchRequest,
    SearchResponse,
    ShardReport,
)
from serving.router import Gathered, Router
from serving.versions import ServedVersion, VersionKeeper

# The metadata columns that hold what a person reads.
TEXT_COLUMNS = ("title", "text")
HEALTH_TIMEOUT_S = 2.0


class Stopwatch:
    """Milliseconds by stage, for the answer and for the metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._begin = self._last = perf_counter()
        self.milliseconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """Ends a stage."""
        now = perf_counter()
        self._metrics.stages.labels(stage).observe(now - self._last)
        self.milliseconds[stage] = round((now - self._last) * 1000, 3)
        self.milliseconds["total"] = round((now - self._begin) * 1000, 3)
        self._last = now


class SearchService:
    """Answers requests from one index version each.

    Args:
        config: limits and defaults.
        versions: the index versions and their models.
        router: the shard groups.
        metrics: seconds by stage, batch sizes.
    """

    def __init__(
        self, config: ServeConfig, versions: VersionKeeper, router: Router, metrics: Metrics
    ) -> None:
        self._config = config
        self._versions = versions
        self._router = router
        self._metrics = metrics
        wait_s = config.batch_wait_ms / 1000
        self._queries = MicroBatcher(config.max_batch, wait_s, metrics.observe_batch)
        # Documents have a thread of their own, so that queries do not queue up behind a rerank.
        self._documents = MicroBatcher(config.max_batch, 0.0)

    async def search(self, request: SearchRequest) -> SearchResponse:
        """Finds documents.

        Raises:
            SearchError: the request exceeds a limit, or the filter or a setting is refused.
            ServiceError: the version is not served, or shards did not answer.
        """
        watch = Stopwatch(self._metrics)
        self._check_texts("queries", request.texts, self._config.max_queries)
        self._check_limit("k", request.k, self._config.max_k)
        if request.search is not None:
            for name in ("probes", "candidates", "rerank"):
                limit = getattr(self._config, f"max_{name}")
                self._check_limit(f"search.{name}", getattr(request.search, name), limit)
        version = self._versions.served(request.index_version)
        vectors = await self._queries.encode(version.encode_queries, request.texts)
        watch.lap("encode")
        query = _group_query(
            version,
            vectors,
            k=request.k,
            params=request.search or self._config.search,
            filter=request.filter,
            columns=_columns(request.include),
        )
        gathered = await self._router.ask(
            lambda group: group.search(query), version.shards, allow_partial=request.allow_partial
        )
        watch.lap("search")
        results = _merge(gathered.answers, request)
        watch.lap("merge")
        return SearchResponse(
            results=results,
            index=version.ref.name,
            version=version.ref.version,
            shards=gathered.report,
            timings_ms=watch.milliseconds,
        )

    async def rerank(self, request: RerankRequest) -> RerankResponse:
        """Orders given texts or documents of the index by their MaxSim score.

        Raises:
            SearchError: the request exceeds a limit.
            UnknownDocument: the index has no document of an id.
            ServiceError: the version is not served, or shards did not answer.
        """
        watch = Stopwatch(self._metrics)
        self._check_texts("query", [request.query], 1)
        given = request.documents if request.documents is not None else request.document_ids or []
        self._check_texts("documents", given, self._config.max_documents)
        version = self._versions.served(request.index_version)
        vectors = await self._queries.encode(version.encode_queries, [request.query])
        watch.lap("encode")
        report = ShardReport(ok=version.shards, total=version.shards)
        if request.documents is not None:
            documents = await self._encode_documents(version, request.documents)
            watch.lap("encode_documents")
            # Not on the event loop: other requests would wait, and deadlines pass, while it computes.
            scores = await asyncio.to_thread(maxsim_ragged, torch.from_numpy(vectors[0]), documents)
            ranked = [RankedText(index=i, score=score) for i, score in enumerate(scores.tolist())]
        else:
            ids = list(request.document_ids or ())
            found = await self._score(version, vectors, ids, request.allow_partial)
            report = found.report
            known = {key: score for answer in found.answers for key, score in answer.items()}
            unknown = [key for key in ids if key not in known]
            if unknown and not report.failed:
                some = ", ".join(map(repr, unknown[:5]))
                raise UnknownDocument(f"{version.ref} has no document {some} ({len(unknown)} of {len(ids)})")
            ranked = [
                RankedText(index=i, id=key, score=known[key]) for i, key in enumerate(ids) if key in known
            ]
        ranked.sort(key=lambda item: (-item.score, item.index))
        watch.lap("score")
        return RerankResponse(
            results=ranked[: request.k],
            index=version.ref.name,
            version=version.ref.version,
            shards=report,
            timings_ms=watch.milliseconds,
        )

    async def health(self) -> Health:
        """Whether every group has the current version loaded."""
        return await self._versions.health(HEALTH_TIMEOUT_S)

    def close(self) -> None:
        """Stops the encoder threads."""
        self._queries.close()
        self._documents.close()

    async def _encode_documents(self, version: ServedVersion, texts: Sequence[str]) -> RaggedVectors:
        """Batch after batch, so that two requests take turns."""
        vectors: list[np.ndarray] = []
        for start in range(0, len(texts), self._config.max_batch):
            part = texts[start : start + self._config.max_batch]
            vectors += await self._documents.encode(version.encode_documents, part)
        lengths = torch.tensor([len(item) for item in vectors])
        return RaggedVectors(torch.from_numpy(np.concatenate(vectors)), lengths)

    async def _score(
        self, version: ServedVersion, vectors: list[np.ndarray], ids: Sequence[str], allow_partial: bool
    ) -> Gathered[dict[str, float]]:
        query = _group_query(version, vectors, k=1, params=self._config.search)
        return await self._router.ask(
            lambda group: group.score(query, ids), version.shards, allow_partial=allow_partial
        )

    def _check_texts(self, name: str, texts: Sequence[str], most: int) -> None:
        if len(texts) > most:
            raise SearchError(f"{name}: {len(texts)} are given, at most {most} are allowed")
        for position, text in enumerate(texts):
            if len(text) > self._config.max_text_length:
                raise SearchError(
                    f"{name}.{position}: {len(text)} characters, at most {self._config.max_text_length} "
                    "are allowed"
                )

    def _check_limit(self, name: str, given: int, most: int) -> None:
        if given > most:
            raise SearchError(f"{name}: {given} is given, at most {most} is allowed")


def _group_query(version: ServedVersion, vectors: list[np.ndarray], **settings: Any) -> GroupQuery:
    lengths = np.array([len(item) for item in vectors], dtype=np.int64)
    return GroupQuery(version.ref.version, np.concatenate(vectors), lengths, **settings)


def _columns(include: Sequence[str]) -> tuple[str, ...] | None:
    """Metadata columns that an answer needs; None for all."""
    if "metadata" in include:
        return None
    return TEXT_COLUMNS if "text" in include else ()


def _merge(answers: Sequence[GroupHits], request: SearchRequest) -> list[list[Result]]:
    """One ranking per query from those of the groups, with texts and metadata as asked for."""
    records = {key: record for answer in answers for key, record in answer.records.items()}
    results = []
    for position in range(len(request.texts)):
        merged = merge_hits([answer.hits[position] for answer in answers], request.k)
        results.append([_result(hit.id, hit.score, records.get(hit.id, {}), request) for hit in merged])
    return results


def _result(key: str, score: float, record: dict[str, Any], request: SearchRequest) -> Result:
    result = Result(id=key, score=score)
    if "text" in request.include:
        result.title, result.text = (record.get(name) for name in TEXT_COLUMNS)
    if "metadata" in request.include:
        result.metadata = {name: value for name, value in record.items() if name not in TEXT_COLUMNS}
    return result
