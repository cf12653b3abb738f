"""Joining Ray: the cluster this process was submitted to, a named one, or an embedded local Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray

from cluster.config import Recipe
from colbert_core.errors import ConfigError

# Logical CPUs beyond the cores of an embedded Ray: data tasks run beside the training workers,
# which each hold a core but wait for data some of the time.
SPARE_CPUS = 2
# Idle threads of one process must not spin on the cores that another one computes on. To wake a thread up
# takes longer than most pauses between two products, though: GNU's OpenMP, which torch has, spins for some
# 30 µs first.
SHORT_WAITS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}
# Tells the workers of an embedded Ray that no other job runs on it.
OWN_RAY = "RAYCOLBERT_OWN_RAY"


def has_cluster(recipe: Recipe) -> bool:
    """Whether there is a Ray to join, so that none needs to be started."""
    return ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS") or recipe.ray.address)


def go_before_helpers() -> None:
    """Lets this thread, and those that it starts, go before Ray's helpers on an embedded Ray.

    Ray starts every worker at niceness 15, its own helpers too. Each of these wakes up a hundred times a
    second, and a matrix product on all cores waits for the thread that was interrupted. Nothing changes on
    a cluster, where other jobs have a right to the cores, nor where the system does not permit it.
    """
    if os.environ.get(OWN_RAY):
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)


@contextmanager
def ray_session(recipe: Recipe) -> Iterator[None]:
    """Connects to Ray for the time of the block; inside another session it does nothing.

    A job started by ``ray job submit`` finds ``RAY_ADDRESS`` in its environment and joins that
    cluster. Otherwise ``ray.address`` of the recipe is joined, and without one a local Ray is
    started and stopped again at the end of the block. An unrelated Ray that happens to run on this
    machine is never joined by accident.

    Raises:
        ConfigError: the address cannot be joined.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or recipe.ray.address
    # Idle threads of one process must not spin on the cores that another one computes on.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    if not address:
        environment[OWN_RAY] = "1"
        environment["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody takes this machine away
        # Workers started in advance lack this environment: none would be used, and each would take memory.
        environment["RAY_prestart_worker_first_driver"] = "0"
    os.environ.update(environment)
    try:
        if address:
            ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": environment})
        else:
            cores = recipe.ray.num_cpus or (os.cpu_count() or 1) + SPARE_CPUS
            memory = recipe.ray.object_store_mb * 2**20 if recipe.ray.object_store_mb else None
            ray.init(
                address="local",
                num_cpus=cores,
                object_store_memory=memory,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                runtime_env={"env_vars": environment},
            )
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"ray.address: cannot join Ray at {address!r}: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()
