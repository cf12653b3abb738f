"""Prometheus metrics of a front, and one exposition for all fronts.

Behind Serve's proxy a scrape reaches any one front. Counters of different processes must not alternate
in one series, so the front that is scraped asks all fronts and labels each series with its replica.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

# Seconds: from a search in memory (1 ms) to past any deadline that a person waits for.
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one front process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "raycolbert_requests", "Requests answered", ["route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "raycolbert_request_seconds",
            "Seconds from request to answer",
            ["route"],
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.stages = Histogram(
            "raycolbert_stage_seconds",
            "Seconds that a request spends waiting for and in one stage",
            ["stage"],
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.groups = Histogram(
            "raycolbert_group_seconds",
            "Seconds from the call of a shard group to its answer",
            ["group"],
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "raycolbert_batch_texts", "Texts encoded together", buckets=BATCH_BUCKETS, registry=self.registry
        )
        self.batch_seconds = Histogram(
            "raycolbert_batch_seconds",
            "Seconds to encode one batch",
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.shard_failures = Counter(
            "raycolbert_shard_failures",
            "Calls of a shard group without an answer",
            ["group", "reason"],
            registry=self.registry,
        )
        self.inflight = Gauge("raycolbert_inflight_requests", "Requests in work", registry=self.registry)
        self.version = Gauge(
            "raycolbert_index_version",
            "1 for the index version that requests get, 0 for one that is kept for a while after a swap",
            ["index", "version"],
            registry=self.registry,
        )
        self.swaps = Counter("raycolbert_version_swaps", "Changes of the version", registry=self.registry)
        self.load_failures = Counter(
            "raycolbert_version_load_failures",
            "Attempts to bring up a new version that failed",
            registry=self.registry,
        )

    def observe_batch(self, size: int, seconds: float) -> None:
        """Counts one encoded batch."""
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def exposition(self) -> str:
        """The metrics as Prometheus text."""
        return generate_latest(self.registry).decode("utf-8")


class _Merged(Collector):
    def __init__(self, expositions: Mapping[str, str]) -> None:
        self._expositions = expositions

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._expositions.items():
            parsed: Iterable[Metric] = text_string_to_metric_families(text)
            for family in parsed:
                merged = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                merged.samples += [
                    Sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
                    for sample in family.samples
                ]
        yield from families.values()


def merge_expositions(expositions: Mapping[str, str]) -> str:
    """One Prometheus text from several; each series gets the label ``replica``.

    Args:
        expositions: Prometheus text by replica.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(expositions))
    return generate_latest(registry).decode("utf-8")
