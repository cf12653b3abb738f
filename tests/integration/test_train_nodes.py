"""An elastic run on several nodes with its storage in S3: one node dies, the run ends with the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.checkpoints import RunCheckpoints
from cluster.trainer import run_name, train_phase
from tests.s3_server import S3Server
from tests.tiny_training import When, furthest, publish_inputs, published_weights, training_recipe

STEPS = 160
EVERY = 20
PHASE: dict[str, Any] = {
    "steps": STEPS,
    "queries_per_step": 16,
    # Maxima jump where rounding differs; with small steps the jumps stay small.
    "optimizer": {"lr": 1e-5, "warmup_steps": 5, "weight_decay": 0.01},
    "checkpoint": {"every_steps": EVERY, "keep_last": 1},
}
# A dead node is noticed within seconds instead of half a minute.
FAST_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 2,
}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs and two nodes with room for one worker each."""
    # How long Ray Train waits for a worker on the dead node before it counts again what there is.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": 100 * 2**20,
            "_system_config": FAST_HEALTH_CHECKS,
            "include_dashboard": False,
        },
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="WARNING")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_an_elastic_run_outlives_a_node(nodes: Cluster, s3_server: S3Server, tmp_path: Path) -> None:
    storage = s3_server.storage(cache_dir=str(tmp_path / "cache"))
    recipe = training_recipe(tmp_path, storage=storage, num_workers=[1, 2], **PHASE)
    registry = publish_inputs(recipe)
    checkpoints = RunCheckpoints(registry.store, run_name(recipe, "p"))
    node = sorted(nodes.worker_nodes, key=lambda each: each.node_id)[0]
    with When(lambda: bool(checkpoints.steps()), node.kill_raylet) as killer:
        result = train_phase(recipe, "p", registry)
    assert killer.done
    workers = [record.workers for record in result.records]
    assert [record.step for record in result.records] == list(range(1, STEPS + 1))
    # Two workers at first; after the node's death one, which begins again at a resume state.
    assert workers == sorted(workers, reverse=True)
    assert set(workers) == {1, 2}
    assert workers.count(2) % EVERY == 0

    alone = training_recipe(tmp_path / "alone", base=recipe.model.base, **PHASE)
    undisturbed = train_phase(alone, "p", alone_registry := publish_inputs(alone))
    assert {record.workers for record in undisturbed.records} == {1}
    found = published_weights(registry, result.ref)
    wanted = published_weights(alone_registry, undisturbed.ref)
    # A key bias has no gradient but rounding, which the optimiser scales up; it changes no output.
    names = [key for key in found if "key.bias" not in key]
    assert furthest({k: found[k] for k in names}, {k: wanted[k] for k in names}) <= 1e-5
