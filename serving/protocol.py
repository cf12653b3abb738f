"""What clients, fronts and shard groups say to each other.

The HTTP bodies are pydantic models: they are the API's documentation and its input check. The messages
between a front and a shard group are plain dataclasses that Ray moves between processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from colbert_core.config import SearchConfig
from colbert_core.index import PartialHits

# -- HTTP ---------------------------------------------------------------------------------------------


class Body(BaseModel):
    """A request or response body; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


Text = Annotated[str, Field(min_length=1)]


class SearchRequest(Body):
    """Find documents for one query or for several."""

    queries: list[Text] | None = Field(None, min_length=1, description="several queries")
    query: Text | None = Field(None, description="one query; the answer then has one result list")
    k: int = Field(10, ge=1, description="documents per query")
    filter: dict[str, Any] | None = Field(
        None,
        description='conditions on metadata, as {"topic": "music", "year": {"$gte": 2020}}; operators: $eq, '
        '$ne, $gt, $gte, $lt, $lte, $in; $and, $or, $not; {"$ids": […]}, alone, selects by id',
    )
    search: SearchConfig | None = Field(None, description="quality settings instead of the service's own")
    allow_partial: bool = Field(
        False, description="answer from the shards that did; by default a missing shard fails the request"
    )
    index_version: str | None = Field(None, description="a version that is served, instead of the current")
    include: list[Literal["text", "metadata"]] = Field(
        ["text"],
        description="what a result carries besides id and score, where the index has it: 'text' is title and "
        "text, 'metadata' all other columns",
    )

    @model_validator(mode="after")
    def _one_form(self) -> SearchRequest:
        if (self.query is None) == (self.queries is None):
            raise ValueError("give exactly one of 'query' and 'queries'")
        return self

    @property
    def texts(self) -> list[str]:
        """The queries, one or several."""
        return [self.query] if self.query is not None else list(self.queries or ())


class RerankRequest(Body):
    """Order given documents by MaxSim with a query."""

    query: Text
    documents: list[Text] | None = Field(None, min_length=1, description="texts, encoded and scored exactly")
    document_ids: list[Text] | None = Field(
        None, min_length=1, description="documents of the index, scored from their compressed vectors"
    )
    k: int | None = Field(None, ge=1, description="best documents returned; default: all")
    allow_partial: bool = Field(False, description="with document_ids: as in a search")
    index_version: str | None = Field(None, description="a version that is served, instead of the current")

    @model_validator(mode="after")
    def _one_form(self) -> RerankRequest:
        if (self.documents is None) == (self.document_ids is None):
            raise ValueError("give exactly one of 'documents' and 'document_ids'")
        return self


class Result(Body):
    """One document of an answer."""

    id: str
    title: str | None = None
    score: float = Field(description="sum over the query's tokens of the best similarity in the document")
    text: str | None = None
    metadata: dict[str, Any] | None = None


class RankedText(Body):
    """One given document of a rerank answer."""

    index: int = Field(description="position in the request's 'documents', from 0")
    id: str | None = Field(None, description="with document_ids: the id")
    score: float


class FailedShards(Body):
    """Shards that are missing from an answer, and why."""

    group: str
    shards: list[int]
    reason: str


class ShardReport(Body):
    """How much of the index an answer comes from."""

    ok: int
    total: int
    failed: list[FailedShards] = []


class SearchResponse(Body):
    """Results in the order of the queries, best first; equal scores are ordered by id."""

    results: list[list[Result]]
    index: str
    version: str
    shards: ShardReport
    timings_ms: dict[str, float]


class RerankResponse(Body):
    """The documents, best first; equal scores keep the order of the request."""

    results: list[RankedText]
    index: str
    version: str
    shards: ShardReport
    timings_ms: dict[str, float]


class GroupHealth(Body):
    """One shard group, as its replicas answered."""

    name: str
    replicas: int = Field(description="replicas that answered")
    ready: int = Field(description="replicas that have the current version loaded")
    problem: str | None = None


class Health(Body):
    """Whether every shard of the current version can be searched."""

    status: Literal["ok", "starting", "degraded"]
    index: str
    version: str | None
    groups: list[GroupHealth]
    pending_version: str | None = Field(None, description="a newer version on its way")
    problem: str | None = Field(None, description="why the newer version, or the first, is not served")


class ErrorDetail(Body):
    type: str
    message: str


class ErrorResponse(Body):
    """Every error has this body."""

    error: ErrorDetail


# -- between a front and a shard group ------------------------------------------------------------------


@dataclass(frozen=True)
class GroupQuery:
    """One search over the shards of a group.

    Attributes:
        version: index version that must answer; no other may.
        vectors: fp32 ``[total, dim]``, the token vectors of all queries.
        lengths: int64 ``[n]``, vectors of each query.
        k: results per query.
        params: quality settings.
        filter: conditions on metadata, or None.
        columns: metadata columns to return, or None for all that the index has.
    """

    version: str
    vectors: np.ndarray
    lengths: np.ndarray
    k: int
    params: SearchConfig
    filter: dict[str, Any] | None = None
    columns: tuple[str, ...] | None = ()

    def split(self) -> list[np.ndarray]:
        """The vectors ``[length, dim]`` of each query, as views."""
        return list(np.split(self.vectors, np.cumsum(self.lengths)[:-1]))


@dataclass(frozen=True)
class GroupHits:
    """A group's answer to a search.

    Attributes:
        hits: for each query the group's part of the answer.
        records: metadata of the documents found, by id.
    """

    hits: list[PartialHits]
    records: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Refusal:
    """A request that a group does not answer: the client's mistake, told by its type and message."""

    type: str
    message: str


@dataclass(frozen=True)
class NotLoaded:
    """The replica lacks the version that was asked for; it has begun to load it."""

    version: str


@dataclass(frozen=True)
class ReplicaState:
    """What a replica of a shard group holds.

    Attributes:
        replica: its id.
        versions: 'ready', 'loading', or 'failed: why', by version.
    """

    replica: str
    versions: dict[str, str] = field(default_factory=dict)
