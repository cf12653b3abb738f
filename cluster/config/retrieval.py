"""The index, the systems to compare, and the service."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from cluster.config.base import Metric, Name
from colbert_core.config import CodecConfig, FrozenModel, SearchConfig
from colbert_core.metric_names import parse_metric


class IndexConfig(FrozenModel):
    name: Name
    model: str = Field("averaged", description="'base', a phase, 'averaged', or NAME@VERSION-or-alias")
    sources: tuple[Name, ...] = Field(min_length=1, description="data sources whose corpora are indexed")
    shards: int = Field(1, ge=1)
    codec: CodecConfig = CodecConfig()
    encode_workers: int = Field(1, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    token_budget: int | None = Field(
        None, ge=512, description="tokens of one batch; default: 16,384, on a CPU 2,048"
    )
    pool_factor: int = Field(1, ge=1, description="token pooling: keep one vector in this many")


class System(FrozenModel):
    """A retriever to compare: a scorer, an ensemble of scorers, or a ColBERT model."""

    scorer: Name | None = None
    ensemble: dict[Name, Annotated[float, Field(gt=0)]] | None = None
    model: str | None = Field(None, description="as index.model; searched exactly, by MaxSim")
    index: bool = Field(False, description="with model: search the built index instead of exact MaxSim")

    @model_validator(mode="after")
    def _one_kind(self) -> System:
        if sum(value is not None for value in (self.scorer, self.ensemble, self.model)) != 1:
            raise ValueError("a system has exactly one of 'scorer', 'ensemble' and 'model'")
        if self.index and self.model is None:
            raise ValueError("'index' goes with 'model': scorers have no index")
        return self


class Gate(FrozenModel):
    """Promotion to the 'production' alias: the candidate must not be worse than its start."""

    source: Name
    metric: Metric = "nDCG@10"
    tolerance: float = Field(0.0, ge=0, description="how much worse is still accepted")


class EvaluateConfig(FrozenModel):
    sources: tuple[Name, ...] = Field(min_length=1)
    systems: dict[Name, System] = Field(min_length=1)
    metrics: tuple[Metric, ...] = ("nDCG@10", "R@1", "R@3", "R@10")
    baseline: Name | None = Field(None, description="system that the paired intervals compare with")
    depth: int = Field(100, ge=1, description="documents kept per query in the run files")
    gate: Gate | None = None
    max_queries: int | None = Field(
        None, ge=1, description="a seeded sample of each source's labelled questions; default: all"
    )

    @model_validator(mode="after")
    def _deep_enough(self) -> EvaluateConfig:
        for name in (*self.metrics, *([self.gate.metric] if self.gate else ())):
            if parse_metric(name)[1] > self.depth:
                raise ValueError(f"depth: {self.depth} documents are kept per query, too few for {name}")
        return self


class ServeConfig(FrozenModel):
    """The Ray Serve application."""

    index: str | None = Field(None, description="NAME@VERSION-or-alias; default: index.name@production")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    fronts: tuple[int, int] = Field((1, 1), description="fewest and most front replicas")
    groups: int = Field(1, ge=1, description="shard groups: deployments that share the index's shards")
    group_replicas: tuple[int, int] = Field((1, 1), description="fewest and most replicas of a group")
    cpus_per_front: float = Field(1.0, ge=0)
    cpus_per_group: float = Field(1.0, ge=0)
    threads_per_group: int = Field(1, ge=1)
    deadline_ms: int = Field(2000, ge=1, description="a shard group later than this is reported as missing")
    search: SearchConfig = SearchConfig()
    max_k: int = Field(1000, ge=1)
    max_probes: int = Field(1024, ge=1, description="most that a request may ask for, as of the next two")
    max_candidates: int = Field(100_000, ge=1)
    max_rerank: int = Field(10_000, ge=1, description="the work grows with its square")
    max_queries: int = Field(64, ge=1, description="queries of one request")
    max_documents: int = Field(1000, ge=1, description="documents of one rerank request")
    max_text_length: int = Field(20_000, ge=1, description="characters of one query or document")
    max_body_kb: int = Field(4096, ge=1)
    max_inflight: int = Field(64, ge=1, description="requests in work at one front; one more gets 429")
    max_batch: int = Field(16, ge=1, description="queries encoded together")
    batch_wait_ms: float = Field(2.0, ge=0)
    api_keys_env: str | None = Field(
        None, description="environment variable with the accepted keys, comma-separated"
    )
    poll_alias_s: float = Field(
        10.0, gt=0, description="how often the index alias is looked up for a new version"
    )
    grace_s: float = Field(60.0, ge=0, description="how long a version stays loaded after it was replaced")
    questions: tuple[str, ...] = Field((), description="asked over HTTP by the pipeline, answers shown")

    @field_validator("fronts", "group_replicas")
    @classmethod
    def _ordered(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= value[0] <= value[1]:
            raise ValueError(f"must be [fewest, most] with 1 <= fewest <= most, not {list(value)}")
        return value
