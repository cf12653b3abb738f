"""An index build on several nodes of which one dies: what is left of the cluster finishes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from cluster.artifacts import index_ref
from cluster.index_corpus import CHUNK_DOCUMENTS, BuildArea
from cluster.registry import Registry
from jobs import index
from tests.integration.test_index_job import add_source, contents, corpus, named, recipe
from tests.ray_nodes import kill_node_of, two_nodes
from tests.tiny_models import tiny_bert_dir
from tests.tiny_training import When

CHUNKS = 40


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with two_nodes() as cluster:
        yield cluster


def index_workers() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if named(process, "IndexWorker")]


def test_a_build_outlives_a_node_that_nothing_replaces(nodes: Cluster, tmp_path: Path) -> None:
    add_source(tmp_path, "long", corpus(CHUNKS * CHUNK_DOCUMENTS))
    tiny_bert_dir(tmp_path / "bert")
    settings = {"shards": 2, "encode_workers": 2, "cpus_per_worker": 1.0}
    whole, given = (recipe(tmp_path, tmp_path / name, "long", **settings) for name in ("whole", "cut"))
    chunks = index.run(whole).metrics["chunks_encoded"]
    area = BuildArea(Registry.open(given.storage).store, index_ref(given))
    met: list[int] = []

    def kill_a_node() -> None:
        workers = index_workers()
        kill_node_of(workers[0])
        met.extend((len(workers), len(area.encoded())))

    # Both workers are at a chunk when some chunks are done.
    with When(lambda: len(area.encoded()) >= 2, kill_a_node) as killer:
        report = index.run(given)
    assert killer.done
    workers, encoded = met
    print(f"the worker was dead when {encoded} chunks were encoded")
    assert workers == 2
    assert encoded < chunks == report.metrics["chunks_encoded"]
    assert contents(given) == contents(whole)
