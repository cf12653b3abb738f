"""A Ray cluster of several nodes on this machine, whose raylets can be killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import ray
from ray.cluster_utils import Cluster

from tests.processes import family, kill

# A dead raylet refuses connections, which is noticed within seconds instead of half a minute.
FAST_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 2,
}
STORE_BYTES = 100 * 2**20


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """A head without CPUs, which this process is on, and two nodes with one CPU each."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": STORE_BYTES,
            "_system_config": FAST_HEALTH_CHECKS,
            "include_dashboard": False,
        },
    )
    for _ in range(2):
        add_node(cluster)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="WARNING")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def add_node(cluster: Cluster) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)


def kill_raylet_of(worker: psutil.Process) -> None:
    """kill -9 of the raylet on whose node a worker runs."""
    raylet = psutil.Process(worker.ppid())
    assert raylet.name() == "raylet"
    raylet.kill()


def kill_node_of(worker: psutil.Process) -> None:
    """kill -9 of all of the node on which a worker runs, for a worker may outlive its raylet."""
    raylet = psutil.Process(worker.ppid())
    assert raylet.name() == "raylet"
    kill(family(raylet.pid))
