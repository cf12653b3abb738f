"""What a larger index would take, against figures worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks.support.growth_scale import UnitCosts, carried_on
from colbert_core.config import SearchConfig

# 1,000 documents of 200 vectors; 10 of a query, each with 16 lists of 200 vectors.
ROW = {
    "vectors": 200_000,
    "documents": 1000,
    "centroids": 1000,
    "scan_ms": 0.5,
    "rest_ms": 4.0,
    "thread_ms": {"gather": 0.032, "interact": 1.0, "score": 4.0},
    "nearest_s": 1.0,
    "build_s": 3.0,
    "bytes_per_token": 70.0,
}
COSTS = UnitCosts.of(ROW, threads=2, probes=16, query_vectors=10)


def test_costs_by_unit() -> None:
    assert COSTS.scan_ns == pytest.approx(1000)  # half a millisecond of two threads, 1,000 centroids
    assert COSTS.entry_ns == pytest.approx(1)  # 32 µs, 32,000 entries
    assert COSTS.other_ms == pytest.approx(4 - 5.032 / 2)
    assert COSTS.nearest_ns == pytest.approx(10)  # 2 s, 2e8 pairs
    assert COSTS.vector_us == pytest.approx(20)
    assert COSTS.vectors_per_passage == 200


@pytest.mark.parametrize(("centroids", "bytes_a_vector"), [(1 << 16, 70), (1 << 17, 72)])
def test_a_hundred_million_passages(centroids: int, bytes_a_vector: int) -> None:
    search = SearchConfig(probes=16, candidates=2000, rerank=400)
    found = carried_on(COSTS, search=search, query_vectors=10, dim=128, centroids=centroids)
    assert found["vectors_a_centroid"] == pytest.approx(2e10 / centroids)
    assert found["index_tb"] == pytest.approx(2e10 * bytes_a_vector / 1e12)
    assert found["scan_ms"] == pytest.approx(1e-3 * centroids / 8)
    assert found["lists_ms"] == pytest.approx(160 * 2e10 / centroids / 20 / 8 / 1e6)
    assert found["bounded_ms"] == pytest.approx((1 + 4 * 5) / 8)
    # 32 of 256 or 512 cells, and their means.
    compared = {1 << 16: 256 + 32 * 256, 1 << 17: 512 + 32 * 256}[centroids]
    assert found["nearest_core_hours"] == pytest.approx(10e-9 * compared * 2e10 / 3600)
    assert found["rest_core_hours"] == pytest.approx(20e-6 * 2e10 / 3600)


def test_without_a_number_the_plaid_rule_gives_it() -> None:
    found = carried_on(COSTS, search=SearchConfig(), query_vectors=10, dim=128, centroids=None)
    assert found["centroids"] == 1 << 21  # 16 √2e10 = 2,262,742
