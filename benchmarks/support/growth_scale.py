"""What an index of a hundred million passages would take, from a smaller one's costs by unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from colbert_core.config import SearchConfig
from colbert_core.index.assignment import comparisons
from colbert_core.index.codec import default_centroids

PASSAGES = 100_000_000
GROUPS, GROUP_THREADS = 20, 8  # machines that search, and the threads of each
BUDGETS = (1 << 16, 1 << 18, None)  # centroids; None: the PLAID rule
SHORT_CODES, WIDER_CODE = 1 << 16, 2  # up to so many centroids a code has two bytes, then so many more
POINTS = 64  # vectors of the sample that a codec is trained from, for each centroid


@dataclass(frozen=True)
class UnitCosts:
    """What the largest index of a growth benchmark took, by unit.

    Attributes:
        scan_ns: thread-nanoseconds of a query's scan, a centroid.
        entry_ns: thread-nanoseconds of gathering, an entry of a probed list.
        interact_ms: thread-milliseconds of scoring so many ``candidates`` by centroids alone, a query.
        score_ms: thread-milliseconds of scoring ``rerank`` documents by residuals, a query.
        other_ms: milliseconds of a query that none of these has.
        nearest_ns: thread-nanoseconds of a build, a vector and centroid (or cell) that it is compared with.
        vector_us: thread-microseconds of the rest of a build, a vector.
        bytes_per_vector: of the index.
        vectors_per_passage: of the set.
    """

    scan_ns: float
    entry_ns: float
    interact_ms: float
    score_ms: float
    other_ms: float
    nearest_ns: float
    vector_us: float
    bytes_per_vector: float
    vectors_per_passage: float

    @classmethod
    def of(cls, row: Mapping[str, Any], *, threads: int, probes: int, query_vectors: float) -> UnitCosts:
        """Of one size of the benchmark.

        Args:
            row: its figures.
            threads: that it was built and searched with.
            probes: centroids probed for each vector of a query.
            query_vectors: of a query, on average.
        """
        vectors, centroids, stages = row["vectors"], row["centroids"], row["thread_ms"]
        entries = query_vectors * probes * vectors / centroids
        return cls(
            scan_ns=row["scan_ms"] * threads * 1e6 / centroids,
            entry_ns=stages["gather"] * 1e6 / entries,
            interact_ms=stages["interact"],
            score_ms=stages["score"],
            other_ms=row["rest_ms"] - sum(stages.values()) / threads,
            nearest_ns=row["nearest_s"] * threads * 1e9 / vectors / comparisons(centroids),
            vector_us=(row["build_s"] - row["nearest_s"]) * threads * 1e6 / vectors,
            bytes_per_vector=row["bytes_per_token"],
            vectors_per_passage=vectors / row["documents"],
        )


def carried_on(
    costs: UnitCosts, *, search: SearchConfig, query_vectors: float, dim: int, centroids: int | None
) -> dict[str, float]:
    """What :data:`PASSAGES` passages take on :data:`GROUPS` machines, each with its share of the shards.

    Every group scans all centroids, for there is one codec; lists and bytes are shared out. A group in
    service scores by residuals what might be among the best of all groups: at most its candidates.

    Args:
        costs: by unit.
        search: the settings that were searched with.
        query_vectors: as in :meth:`UnitCosts.of`.
        dim: of a vector, and bytes of its centroid.
        centroids: their number; None: by the PLAID rule.
    """
    vectors = PASSAGES * costs.vectors_per_passage
    count = centroids or default_centroids(round(vectors))
    entries = query_vectors * search.probes * vectors / count
    index_bytes = vectors * (costs.bytes_per_vector + (WIDER_CODE if count > SHORT_CODES else 0))
    return {
        "centroids": count,
        "vectors_a_centroid": vectors / count,
        "index_tb": index_bytes / 1e12,
        "group_gb": index_bytes / GROUPS / 1e9,
        "centroids_mb": 2 * count * dim / 1e6,
        "sample_gb": count * POINTS * dim * 4 / 1e9,
        "scan_ms": costs.scan_ns * count / GROUP_THREADS / 1e6,
        "lists_ms": costs.entry_ns * entries / GROUPS / GROUP_THREADS / 1e6,
        "bounded_ms": (costs.interact_ms + costs.score_ms * search.candidates / search.rerank)
        / GROUP_THREADS,
        "other_ms": costs.other_ms,
        "nearest_core_hours": costs.nearest_ns * comparisons(count) * vectors / 1e9 / 3600,
        "rest_core_hours": costs.vector_us * vectors / 1e6 / 3600,
    }


LABELS = {
    "centroids": "centroids",
    "vectors_a_centroid": "vectors a centroid",
    "index_tb": "index, TB",
    "group_gb": "a group's share, GB",
    "centroids_mb": "centroids in every process, and as they are on disk, MB",
    "sample_gb": f"sample of {POINTS} vectors a centroid, in fp32, GB",
    "scan_ms": "scan of centroids, in every group, ms",
    "lists_ms": "lists of the probed centroids, ms",
    "bounded_ms": "scoring the candidates, at most, ms",
    "other_ms": "the rest of a query, as it was, ms",
    "nearest_core_hours": "build: nearest centroids, core hours",
    "rest_core_hours": "build: the rest, core hours",
}


def scale_table(columns: Sequence[Mapping[str, float]]) -> Table:
    """The figures of several numbers of centroids side by side."""
    title = f"{PASSAGES:,} passages on {GROUPS} groups of {GROUP_THREADS} threads, worked out, not run"
    table = Table("", title=title, title_justify="left")
    for column in columns:
        rule = "PLAID rule" if column is columns[-1] else "given"
        table.add_column(rule, justify="right")
    for name, label in LABELS.items():
        table.add_row(
            label,
            *(
                f"{column[name]:,.3g}" if column[name] < 1000 else f"{column[name]:,.0f}"
                for column in columns
            ),
        )
    return table
