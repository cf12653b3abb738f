"""Settings of every test process; they must stand before Ray, torch or transformers is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from tests.s3_server import S3Server

os.environ.update(
    S3Server.environment(),
    AWS_EC2_METADATA_DISABLED="true",
    RAY_AUTH_MODE="disabled",
    RAY_TRAIN_V2_ENABLED="1",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
    # The end of a run, and the death of a worker, are noticed in a fraction of a second instead of 2.
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    # A process that nothing uses costs each test that starts Ray most of a second of a core.
    RAY_prestart_worker_first_driver="0",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server for the whole test session; its credentials are in the environment."""
    server = S3Server().start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module", autouse=True)
def no_ray_left_behind() -> Iterator[None]:
    """A Ray that one file's tests started is no Ray for the next file's to join."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
