"""An embedded Ray as the training tests use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray


@contextmanager
def local_ray(*, num_cpus: int = 2, object_store_mb: int = 200) -> Iterator[str]:
    """Starts a Ray of its own and stops it; gives the address for other processes to join it.

    It has no more CPUs than two training workers hold: each has one reader then, and each process costs a
    test many seconds of imports.
    """
    ray.init(
        address="local",
        num_cpus=num_cpus,
        object_store_memory=object_store_mb * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="WARNING",
    )
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
